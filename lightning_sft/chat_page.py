"""stub"""


def build_chat_page() -> str:
    return "<!doctype html>"
