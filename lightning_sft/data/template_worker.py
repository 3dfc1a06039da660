"""Renders one chat template in a process of its own, which may do nothing else.

A template comes with a model that somebody downloaded, so it is a stranger's program. Jinja's
sandbox keeps it from Python's insides; that it ends, and does not fill the memory, only an
operating system can promise. This process gets seconds of processor time for each request, a bound
on its memory, and no new files: where it breaks one of them it dies alone.

`template.py` starts this file by its path and talks to it in lines of JSON: first the template,
then `{"messages": [...], "renders": [[count, add_generation_prompt], ...]}`, answered with
`{"texts": [...]}` or `{"error": "..."}`. It imports nothing of the package.
"""

from __future__ import annotations

# What Jinja would import only when it needs it, and then no longer could.
import encodings.unicode_escape  # noqa: F401
import json
import sys
from typing import Any

import jinja2
import jinja2.debug
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 5  # of one request
MEMORY = 1 << 30  # bytes of address space
MOST_TEXT = 1 << 22  # characters of one rendered text


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which some templates mark what an assistant says: read past."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja wants it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_template(source: str) -> jinja2.Template:
    """The template in the environment that transformers renders in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    # No `strftime_now`: the rows of a data set must not depend on the day.
    return environment.from_string(source)


def render_all(template: jinja2.Template, request: dict[str, Any]) -> list[str]:
    """Each wanted text: of so many of the messages, with the next answer's header or without."""
    texts = []
    for count, add_generation_prompt in request["renders"]:
        text = template.render(
            messages=request["messages"][:count],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
        )
        if len(text) > MOST_TEXT:
            raise jinja2.TemplateError(f"renders to more than {MOST_TEXT:,} characters")
        texts.append(text)
    return texts


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    return json.dumps(value, indent=indent, **({"ensure_ascii": False} | settings))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _limit() -> None:
    """Bound what this process may take; where the system has no such bounds the clock must do."""
    try:
        import resource
    except ImportError:
        return
    for name, most in (("RLIMIT_AS", MEMORY), ("RLIMIT_FSIZE", 0), ("RLIMIT_NOFILE", 3)):
        limit = getattr(resource, name)
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(limit, (most, hard))
        except (OSError, ValueError):  # macOS knows some of them only by name
            continue


def _allow_time() -> None:
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + CPU_SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    _limit()
    template: jinja2.Template | None = None
    for line in sys.stdin:
        _allow_time()
        answer: dict[str, Any]
        try:
            request = json.loads(line)
            if template is None:
                template, answer = make_template(request["template"]), {"texts": []}
            else:
                answer = {"texts": render_all(template, request)}
        except MemoryError:
            answer = {"error": "takes too much memory"}
        except Exception as error:  # whatever a template does is its own fault
            where = getattr(error, "lineno", None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            answer = {"error": f"line {where}: {reason}" if where else reason}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
