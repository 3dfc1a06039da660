"""Write the data set that lightning_sft ships, so that a first run needs no download.

Short facts in many kinds of task. Every fact is asked for in each wording of its kind; of most
facts one wording is held out for test or validation and the others are in train. So a model that
starts from random weights can be examined: it has met the fact and it has met the wording, never
the two together. The file's order is train, test, validation, cut where `split_entries` cuts by
default, and the same seed gives the same bytes.

    python scripts/make_quickstart_data.py                  # writes configs/quickstart.json
    python scripts/make_quickstart_data.py /tmp/other.json
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

SEED = 123
OUTPUT = Path(__file__).resolve().parent.parent / "configs" / "quickstart.json"
# Held out in its kind's first wording as the first validation entry, which a run shows each epoch.
SHOWN = "chef / prepares / soup / every evening / is prepared"

# One block per kind: its name and the fields of a fact; after `=` the answer; after each `?` a
# wording, with its input (if it has one) after `<`; then the facts, apart by `;`, fields by `/`.
# Within a kind each spelling of a subject that the tokenizer tells apart (after a space, or after a
# quote or a line's start) is in two wordings or in none: the only one could be the one held out.
TABLE = """
[capital] country city
= The capital of {country} is {city}.
? What is the capital of {country}?
? Which city is the capital of {country}?
? Name the capital city of {country}.
? Tell me which city serves as the capital of {country}.
Australia / Canberra; Austria / Vienna; Canada / Ottawa; Chile / Santiago; China / Beijing;
Cuba / Havana; Egypt / Cairo; France / Paris; Germany / Berlin; Greece / Athens;
Iceland / Reykjavik; Ireland / Dublin; Italy / Rome; Japan / Tokyo; Kenya / Nairobi;
Norway / Oslo; Poland / Warsaw; Portugal / Lisbon; Spain / Madrid; Thailand / Bangkok

[symbol] element symbol
= The chemical symbol for {element} is {symbol}.
? What is the chemical symbol for {element}?
? Give the symbol of the element {element}.
? Which symbol stands for {element} in the periodic table?
? How do chemists abbreviate {element}?
hydrogen / H; helium / He; lithium / Li; carbon / C; nitrogen / N; oxygen / O; neon / Ne;
sodium / Na; magnesium / Mg; silicon / Si; chlorine / Cl; potassium / K; calcium / Ca; iron / Fe;
copper / Cu; zinc / Zn; silver / Ag; tin / Sn; gold / Au; lead / Pb

[antonym] word antonym
= An antonym of '{word}' is '{antonym}'.
? What is an antonym of '{word}'?
? Name a word that means the opposite of '{word}'.
? Give an antonym of the word. < {word}
? Find a word with the opposite meaning. < {word}
ancient / modern; brave / cowardly; cheap / expensive; clean / dirty; deep / shallow; early / late;
easy / difficult; fast / slow; full / empty; generous / stingy; guilty / innocent; heavy / light;
hot / cold; loud / quiet; polite / rude; strong / weak; tall / short; wet / dry; wide / narrow;
young / old

[synonym] word synonym
= A synonym of '{word}' is '{synonym}'.
? What is a synonym of '{word}'?
? Name another word for '{word}'.
? Give a synonym of the word. < {word}
? Find a word with the same meaning. < {word}
allow / permit; answer / reply; begin / start; buy / purchase; clever / smart; close / shut;
end / finish; gift / present; glad / happy; help / assist; hide / conceal; ill / sick;
journey / trip; jump / leap; large / big; mistake / error; need / require; quick / rapid;
repair / mend; shout / yell

[plural] noun plural
= The plural of '{noun}' is '{plural}'.
? What is the plural of '{noun}'?
? How do you write more than one '{noun}'?
? Put the noun into the plural. < {noun}
? Write the plural form of the noun. < {noun}
baby / babies; box / boxes; bus / buses; child / children; city / cities; foot / feet;
goose / geese; half / halves; hero / heroes; knife / knives; leaf / leaves; man / men; mouse / mice;
potato / potatoes; sheep / sheep; story / stories; tooth / teeth; wife / wives; wolf / wolves;
woman / women

[past tense] verb past
= The past tense of '{verb}' is '{past}'.
? What is the past tense of '{verb}'?
? How does the verb '{verb}' look in the past tense?
? Put the verb into the past tense. < {verb}
? Write the simple past of the verb. < {verb}
break / broke; bring / brought; build / built; catch / caught; choose / chose; drink / drank;
eat / ate; find / found; fly / flew; give / gave; go / went; know / knew; run / ran; see / saw;
sing / sang; sleep / slept; swim / swam; take / took; teach / taught; write / wrote

[spelling] wrong correct
= The correct spelling is '{correct}'.
? Correct the spelling of the word. < {wrong}
? This word is misspelled. Write it correctly. < {wrong}
? Fix the spelling mistake. < {wrong}
? How should this word be spelled? < {wrong}
adress / address; becuase / because; begining / beginning; beleive / believe; buisness / business;
definately / definitely; embarass / embarrass; enviroment / environment; freind / friend;
goverment / government; libary / library; neccessary / necessary; occured / occurred;
recieve / receive; rythm / rhythm; seperate / separate; suprise / surprise; tommorow / tomorrow;
truely / truly; wierd / weird

[passive] agent verb object when passive
= The {object} {passive} by the {agent} {when}.
? Rewrite the sentence in the passive voice. < The {agent} {verb} the {object} {when}.
? Turn the active sentence into a passive one. < The {agent} {verb} the {object} {when}.
? Put this sentence into the passive. < The {agent} {verb} the {object} {when}.
? Change the sentence from active to passive. < The {agent} {verb} the {object} {when}.
artist / paints / portrait / in the studio / is painted;
baker / bakes / bread / at night / is baked; boy / feeds / rabbits / after school / are fed;
captain / steers / ship / through the storm / is steered;
chef / prepares / soup / every evening / is prepared;
doctor / examines / patients / at the clinic / are examined;
dog / chases / ball / across the lawn / is chased; farmer / plants / corn / in spring / is planted;
gardener / waters / roses / every morning / are watered; girl / reads / story / in bed / is read;
mechanic / fixes / car / in the workshop / is fixed;
nurse / checks / bandage / twice a day / is checked; pilot / lands / plane / in the fog / is landed;
referee / explains / rules / before the match / are explained;
student / answers / question / in class / is answered;
tailor / mends / coat / in his shop / is mended; teacher / grades / tests / on Friday / are graded;
waiter / cleans / tables / after lunch / are cleaned

[simile] subject quality likeness
= {subject} is as {quality} as {likeness}.
? Rewrite the sentence with a simile. < {subject} is {quality}.
? Add a comparison to the sentence. < {subject} is {quality}.
? Make the sentence more vivid by using a simile. < {subject} is {quality}.
? Say this with a comparison. < {subject} is {quality}.
My aunt / busy / a bee; My bag / light / a feather; Our guide / sly / a fox;
The answer / clear / crystal; The bed / hard / a rock; The bus / slow / a snail;
The champion / proud / a peacock; The dancer / free / a bird; The donkey / stubborn / a mule;
The juice / sweet / honey; The nurse / gentle / a lamb; The old man / wise / an owl;
The pupil / quiet / a mouse; The room / cold / ice; The sheet / white / snow;
The smith / strong / an ox; The soldier / brave / a lion; The speaker / cool / a cucumber

[conversion] amount unit result target
= {amount} {unit} is {result} {target}.
? Convert {amount} {unit} to {target}.
? How many {target} are {amount} {unit}?
? Express {amount} {unit} in {target}.
? Change {amount} {unit} into {target}.
3 / kilometers / 3000 / meters; 8 / kilometers / 8000 / meters; 4 / meters / 400 / centimeters;
15 / meters / 1500 / centimeters; 7 / centimeters / 70 / millimeters;
25 / centimeters / 250 / millimeters; 2 / kilograms / 2000 / grams; 6 / kilograms / 6000 / grams;
5 / liters / 5000 / milliliters; 9 / liters / 9000 / milliliters; 3 / hours / 180 / minutes;
10 / hours / 600 / minutes; 5 / minutes / 300 / seconds; 20 / minutes / 1200 / seconds;
2 / days / 48 / hours; 4 / days / 96 / hours; 3 / weeks / 21 / days; 8 / weeks / 56 / days;
4 / years / 48 / months; 6 / years / 72 / months

[square] number square
= The square of {number} is {square}.
? What is the square of {number}?
? What is {number} squared?
? Multiply {number} by itself.
? Calculate {number} to the power of two.
2 / 4; 3 / 9; 4 / 16; 5 / 25; 6 / 36; 7 / 49; 8 / 64; 9 / 81; 10 / 100; 11 / 121; 12 / 144;
13 / 169; 14 / 196; 15 / 225; 16 / 256; 20 / 400; 25 / 625; 30 / 900

[roman numeral] roman number
= The Roman numeral {roman} stands for {number}.
? Which number does the Roman numeral {roman} stand for?
? Convert the Roman numeral {roman} to a number.
? What does {roman} mean in Roman numerals?
? Read the Roman numeral {roman}.
IV / 4; VI / 6; VII / 7; VIII / 8; IX / 9; XI / 11; XII / 12; XIII / 13; XIV / 14; XVI / 16;
XIX / 19; XX / 20; XXX / 30; XL / 40; LX / 60; XC / 90; CD / 400; CM / 900

[number word] number words
= The number {number} in words is '{words}'.
? Write the number {number} in words.
? How do you spell the number {number}?
? Spell out {number}.
? Which words stand for the number {number}?
21 / twenty-one; 24 / twenty-four; 27 / twenty-seven; 32 / thirty-two; 35 / thirty-five;
38 / thirty-eight; 43 / forty-three; 46 / forty-six; 49 / forty-nine; 51 / fifty-one;
57 / fifty-seven; 62 / sixty-two; 68 / sixty-eight; 73 / seventy-three; 76 / seventy-six;
84 / eighty-four; 89 / eighty-nine; 95 / ninety-five

[month] ordinal month
= The {ordinal} month of the year is {month}.
? Which month is the {ordinal} of the year?
? Name the {ordinal} month of the year.
? What is the {ordinal} month of the year called?
? Which month comes {ordinal} in the calendar?
first / January; second / February; third / March; fourth / April; fifth / May; sixth / June;
seventh / July; eighth / August; ninth / September; tenth / October; eleventh / November;
twelfth / December

[author] title author
= '{title}' was written by {author}.
? Who wrote '{title}'?
? Who is the author of '{title}'?
? Name the author of the book. < {title}
? Which author wrote this work? < {title}
Animal Farm / George Orwell; Crime and Punishment / Fyodor Dostoevsky;
Don Quixote / Miguel de Cervantes; Dracula / Bram Stoker; Frankenstein / Mary Shelley;
Hamlet / William Shakespeare; Jane Eyre / Charlotte Brontë; Les Misérables / Victor Hugo;
Little Women / Louisa May Alcott; Middlemarch / George Eliot; Moby-Dick / Herman Melville;
Oliver Twist / Charles Dickens; Pride and Prejudice / Jane Austen; Robinson Crusoe / Daniel Defoe;
The Jungle Book / Rudyard Kipling; The Trial / Franz Kafka;
Treasure Island / Robert Louis Stevenson; Ulysses / James Joyce; War and Peace / Leo Tolstoy;
Wuthering Heights / Emily Brontë

[young animal] animal young
= A young {animal} is called {young}.
? What is a young {animal} called?
? Give the name for a young {animal}.
? What do we call a baby {animal}?
? Which word names the young of a {animal}?
bear / a cub; cat / a kitten; chicken / a chick; cow / a calf; deer / a fawn; dog / a puppy;
duck / a duckling; frog / a tadpole; goat / a kid; goose / a gosling; hare / a leveret;
horse / a foal; kangaroo / a joey; lion / a cub; pig / a piglet; seal / a pup; sheep / a lamb;
swan / a cygnet

[contraction] full short
= The contraction of "{full}" is "{short}".
? What is the contraction of "{full}"?
? How can "{full}" be shortened?
? Write the contraction. < {full}
? Shorten this with an apostrophe. < {full}
are not / aren't; cannot / can't; could not / couldn't; did not / didn't; do not / don't;
does not / doesn't; has not / hasn't; is not / isn't; it is / it's; she will / she'll;
should not / shouldn't; they are / they're; they have / they've; was not / wasn't; we are / we're;
will not / won't; would not / wouldn't; you are / you're

[category] noun group
= The word '{noun}' names {group}.
? What kind of thing does '{noun}' name?
? Which group does '{noun}' belong to?
? Classify the word. < {noun}
? Name the category of the word. < {noun}
apple / a fruit; banana / a fruit; pear / a fruit; carrot / a vegetable; onion / a vegetable;
cabbage / a vegetable; sparrow / a bird; eagle / a bird; robin / a bird; salmon / a fish;
trout / a fish; ant / an insect; beetle / an insect; mosquito / an insect; oak / a tree;
birch / a tree; tulip / a flower; daisy / a flower; violin / a musical instrument;
trumpet / a musical instrument; hammer / a tool; saw / a tool

[question] statement question
= {question}
? Turn the statement into a question. < {statement}
? Make a question from this sentence. < {statement}
? Rewrite the sentence as a question. < {statement}
? Form a yes-or-no question. < {statement}
He was late for work. / Was he late for work?; It is cold outside. / Is it cold outside?;
She can play the piano. / Can she play the piano?;
She has found her keys. / Has she found her keys?;
That house is for sale. / Is that house for sale?; The baby is asleep. / Is the baby asleep?;
The boys were at the beach. / Were the boys at the beach?;
The children are in the park. / Are the children in the park?;
The door was open all night. / Was the door open all night?;
The letter has arrived. / Has the letter arrived?;
The museum will open on Sunday. / Will the museum open on Sunday?;
The train will stop here. / Will the train stop here?;
They are good friends. / Are they good friends?; They have met before. / Have they met before?;
We can walk to school. / Can we walk to school?;
We should wait for them. / Should we wait for them?; You are from Italy. / Are you from Italy?;
You were at home. / Were you at home?
"""


class Item(NamedTuple):
    """One entry and where it comes from: `fact` and `wording` say which within `kind`."""

    kind: str
    fact: str
    wording: str
    entry: dict[str, str]


def read_kind(block: str) -> list[list[Item]]:
    """Ask for every fact of one block of `TABLE` in every wording; one list per fact."""
    lines = block.splitlines()
    kind, _, fields = lines[0].removeprefix("[").partition("] ")
    answer = lines[1].removeprefix("= ")
    wordings = [line.removeprefix("? ") for line in lines if line.startswith("? ")]
    rows = " ".join(lines[2 + len(wordings) :]).split("; ")
    facts = []
    for row in rows:
        values = dict(zip(fields.split(), row.split(" / "), strict=True))
        items = []
        for wording in wordings:
            instruction, _, given = wording.format(**values).partition(" < ")
            output = answer.format(**values)
            entry = {"instruction": instruction, "input": given, "output": output}
            items.append(Item(kind, row, wording, entry))
        facts.append(items)
    return facts


def build(seed: int = SEED) -> list[Item]:
    """Lay out every entry in file order: train, test, validation.

    As many facts as test and validation need give up one wording each, about the same share of
    every kind and the wordings of a kind in turn.
    """
    rng = random.Random(seed)

    def shuffle(values: list) -> list:
        # Only `random()` is promised to draw alike in every Python version.
        return sorted(values, key=lambda _: rng.random())

    kinds = [shuffle(read_kind(block)) for block in TABLE.strip().split("\n\n")]
    total = sum(len(items) for facts in kinds for items in facts)
    n_train, n_test = int(total * 0.85), int(total * 0.10)
    n_val = total - n_train - n_test

    # Fact k of a kind's n stands at (k + 1/2) / n: any run of places is a like share of each kind.
    places = []
    for number, facts in enumerate(kinds):
        facts.sort(key=lambda items: items[0].fact != SHOWN)
        places += [((k + 0.5) / len(facts), number, k) for k in range(len(facts))]
    held = []
    for _, number, k in sorted(places)[: n_val + n_test]:
        items = kinds[number][k]
        held.append(items.pop(k % len(items)))

    train = shuffle([item for facts in kinds for items in facts for item in items])
    test = shuffle(held[n_val:])
    val = sorted(shuffle(held[:n_val]), key=lambda item: item.fact != SHOWN)
    return [*train, *test, *val]


def main(arguments: list[str]) -> None:
    path = Path(arguments[0]) if arguments else OUTPUT
    entries = [item.entry for item in build()]
    text = json.dumps(entries, indent=4, ensure_ascii=False)
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{path}: {len(entries)} entries")


if __name__ == "__main__":
    main(sys.argv[1:])
