"""Make a captioned set of emoji in three styles from packages of npm: 256 px (Fluent) and 64 px (Noto, Twemoji).

In an empty folder, fetch and unpack the packages; then make the set:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    for file in *.tgz; do mkdir "${file%.tgz}"; tar xzf "$file" -C "${file%.tgz}"; done
    python examples/emoji.py FOLDER emoji                              # folders emoji/train and emoji/test
    python examples/emoji.py FOLDER emoji-fluent --styles fluent       # the 256 px pictures alone
    python examples/emoji.py FOLDER emoji-tar --tar                    # the same as tar shards

Every emoji without skin tone that is no flag is one concept. Each is drawn on white, and on one flat colour that its
captions name (`--grounds`). Captions are lists: the emoji's names with the style in words. Fluent is the style of
captions that name none. Sizes stay as they are. Nothing is downloaded here; licences: emoji/CREDITS.txt.

Held out: a concept's code point decides whether one of its styles is kept from training (`held_out`), so the three
styles hold out different concepts, and each concept is seen in the other styles. These pairs, on white, are emoji/test.
"""

import argparse
import hashlib
import io
import json
import random
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = Path(__file__).with_name("emoji_names.txt")
LABELS = "emojibase-data-17.0.0/package/en"
HELD_OUT = 0.06  # the share of each style's concepts
SHARD = 1000  # samples in a tar


@dataclass(frozen=True)
class Style:
    """`pictures`: their folder, below that of the packages. `words`: the style in captions."""

    pictures: str
    words: str


STYLES = {
    "fluent": Style("lobehub-fluent-emoji-3d-1.1.0/package/assets", "fluent 3d"),
    "noto": Style("emoji-datasource-google-16.0.0/package/img/google/64", "noto"),
    "twemoji": Style("emoji-datasource-twitter-16.0.0/package/img/twitter/64", "twemoji"),
}
UNNAMED = "fluent"  # the style of captions that name none
WHITE = "white"
GROUNDS = {
    "red": (222, 88, 80),
    "orange": (245, 163, 74),
    "yellow": (250, 221, 110),
    "green": (116, 190, 122),
    "blue": (104, 160, 236),
    "purple": (164, 124, 216),
    "pink": (246, 168, 202),
    "brown": (150, 106, 76),
    "grey": (158, 164, 170),
    "black": (24, 24, 28),
}
NEAR, HIDDEN = 70, 0.2  # a ground is left out where more than this share of a picture is nearer to it than that
FULL = 0.9  # the share of a picture's square that may be opaque, if grounds other than white are to be seen

# --- names ------------------------------------------------------------------------------------------------------------

UNCOUNTABLE = re.compile(
    r"(bacon|bread|broccoli|butter|candy|clothes|coral|cream|custard|falafel|fire|flatbread|fog|garlic|hair|ice|"
    r"lightning|luggage|meat|polish|popcorn|rain|rice|sake|silhouette|snow|spaghetti|steam|sushi|sweat|tea)$"
)
SINGULAR = re.compile(r"(us|ss|rhinoceros)$")  # words that end in s and are no plural
VOWEL = re.compile(r"(?!uni|eu|ewe|one)[aeiou8]|(NG|SOS|ATM|X-ray)\b", re.I)
BEFORE_NOUN = re.compile(
    r" (with|without|in|behind|wearing|rowing|bouncing|getting|tipping|raising|taking) "
)  # labels leave out the articles after these
TWO = {"woman, man": "a woman and a man", "man, man": "two men", "woman, woman": "two women"}
KEYS = {"#": "a hash sign", "*": "an asterisk"}


def with_article(noun: str) -> str:
    """A noun phrase with "a" or "an", unless it is plural or cannot be counted."""
    words = re.split(r" (?:of|on|at|from) ", noun)[0].split()
    first, last = words[0].lower(), words[-1].lower()
    if first not in ("person", "man", "woman") and (
        first in ("a", "an", "the", "men", "women", "people")
        or UNCOUNTABLE.match(last)
        or (last.endswith("s") and not SINGULAR.search(last))
    ):
        return noun
    return f"{'an' if VOWEL.match(noun) else 'a'} {noun}"


def bare(name: str) -> str:
    """A name without its article."""
    return re.sub(r"^(a|an|the) ", "", name)


def said(label: str, labels: set[str]) -> str:
    """What an emoji shows, from its label, one of `labels`: "face with monocle" -> "a face with a monocle"."""
    text = label.replace("’", "'").replace("“", '"').replace("”", '"')
    head, colon, rest = text.partition(": ")
    if colon and rest == "facing right":
        return f"{said(head, labels)}, facing right"
    if colon and rest in TWO:
        return f"{TWO[rest]} {'kissing' if head == 'kiss' else 'with a heart'}"
    if head == "keycap":
        return f"a key with {KEYS.get(rest, f'the number {rest}')}"
    if colon:
        return f"a bald {head}" if rest == "bald" else f"a {head} with {with_article(rest)}"
    if text.endswith((" o'clock", "-thirty")):
        return f"a clock at {text}"
    if text.endswith(" button (blood type)"):
        return f"a blood type {text.split()[0]} button"
    sex, _, role = text.partition(" ")
    if sex in ("man", "woman") and role in labels:
        text = f"{'male' if sex == 'man' else 'female'} {role}"
    parts = BEFORE_NOUN.split(text)
    return "".join(f" {part} " if i % 2 else with_article(part) for i, part in enumerate(parts))


def read_names() -> dict[str, tuple[str, ...]]:
    """Lines of `emoji_names.txt` by label: the name ("" for the script's own), and others; () for one to leave out."""
    found = {}
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        label, colon, names = line.partition(": ")
        if colon and not line.startswith("#"):
            found[label] = () if names == "-" else tuple(name.strip() for name in names.split(";"))
    return found


# --- concepts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """An emoji without skin tone. `code`: its code points, without the selector FE0F; `names`: the first is its own."""

    code: str
    names: tuple[str, ...]
    group: str


def plain(code: str) -> str:
    """Code points as one spelling: lower case, without the variation selector, which the packages use differently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def concepts(folder: Path) -> list[Concept]:
    """All concepts in the order of Unicode, from emojibase's data."""
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    entries = [e for e in entries if groups.get(e.get("group")) not in (None, "component", "flags")]
    labels, others = {e["label"] for e in entries}, read_names()
    found = []
    for entry in sorted(entries, key=lambda e: e["order"]):
        label = entry["label"]
        names = others.get(label, ("",))
        if names and not label.startswith("family: "):  # who is in it is not drawn in two of the styles
            names = (names[0] or said(label, labels), *names[1:])
            found.append(Concept(plain(entry["hexcode"]), names, groups[entry["group"]]))
    return found


def held_out(code: str) -> str:
    """The style in which a concept is kept from training, "" for none.

    u in [0, 1) is the BLAKE2b hash (8 bytes, little endian) of the code points, divided by 2^64. Of the three styles in
    order, u < 0.06 names the first, u < 0.12 the second, u < 0.18 the third.
    """
    u = int.from_bytes(hashlib.blake2b(code.encode(), digest_size=8).digest(), "little") / 2**64
    number = int(u / HELD_OUT)
    return list(STYLES)[number] if number < len(STYLES) else ""


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A picture and its ground. `about`: captions ("text", a list), concept, style, ground, group; `test`: held out."""

    key: str
    picture: Image.Image  # RGBA
    about: Mapping[str, object]
    test: bool

    def png(self) -> bytes:
        ground = GROUNDS.get(str(self.about["ground"]), WHITE)
        page = Image.alpha_composite(Image.new("RGBA", self.picture.size, ground), self.picture)
        file = io.BytesIO()
        page.convert("RGB").save(file, "PNG")
        return file.getvalue()


def captions(names: tuple[str, ...], style: str, ground: str) -> list[str]:
    """What is typed for an emoji called `names` in a style, on a ground; white is named in one caption."""
    words, first = STYLES[style].words, names[0]
    on = "" if ground == WHITE else f" on {with_article(ground)} background"
    found = [f"{words} emoji of {name}{on}" for name in names]
    found.append(f"{first}{on}, {words} style")
    if ground == WHITE:
        found.append(f"{words} emoji of {first} on a white background")
    if style == UNNAMED:
        found += [f"{name}{on}" for name in names]
        found += [f"{bare(first)}{on}"] if bare(first) != first else []
    return found


def grounds(picture: Image.Image, seed: str, count: int) -> list[str]:
    """White, and `count` colours, drawn by a seed from those that the picture, RGBA, can be told from.

    White alone if the picture leaves next to nothing of its ground to be seen.
    """
    pixels = np.asarray(picture.resize((32, 32), Image.Resampling.NEAREST))
    opaque = pixels[..., 3] > 127
    if opaque.mean() > FULL:
        return [WHITE]
    seen = pixels[opaque][:, :3].astype(int)
    found = [name for name, rgb in GROUNDS.items() if (np.linalg.norm(seen - rgb, axis=1) < NEAR).mean() <= HIDDEN]
    random.Random(seed).shuffle(found)
    return [WHITE, *found[:count]]


def samples(packages: Path, styles: list[str], coloured: int) -> Iterator[Sample]:
    """All samples, concept by concept; the same on every call. Raises OSError for packages that are not there."""
    folders = {style: packages / STYLES[style].pictures for style in styles}
    files = {style: {plain(path.stem): path for path in folder.iterdir()} for style, folder in folders.items()}
    drawn = set()  # a style may draw one picture for two emoji: the first one's names are its captions
    for concept in concepts(packages / LABELS):
        for style in styles:
            path = files[style].get(concept.code)
            if path is None or (style, digest := hashlib.blake2b(path.read_bytes()).digest()) in drawn:
                continue
            drawn.add((style, digest))
            picture = Image.open(path).convert("RGBA")
            test = held_out(concept.code) == style
            for ground in grounds(picture, f"{concept.code} {style}", 0 if test else coloured):
                about = {
                    "text": captions(concept.names, style, ground),
                    "concept": concept.code,
                    "style": style,
                    "ground": ground,
                    "group": concept.group,
                }
                yield Sample(f"{style}-{concept.code}-{ground}", picture, about, test)


# --- files ------------------------------------------------------------------------------------------------------------

CREDITS = """\
Pictures
  fluent   Fluent Emoji by Microsoft, from @lobehub/fluent-emoji-3d 1.1.0, copyright 2023 LobeHub. MIT License.
  noto     Noto Emoji by Google, from emoji-datasource-google 16.0.0. Apache License 2.0,
           https://www.apache.org/licenses/LICENSE-2.0
  twemoji  Twemoji by Twitter, Inc and other contributors, from emoji-datasource-twitter 16.0.0. CC BY 4.0,
           https://creativecommons.org/licenses/by/4.0/
Names      emojibase-data 17.0.0, copyright 2017-2019 Miles Johnson. MIT License.

Changes: pictures were laid on a flat ground and stored as PNG; some names were reworded.
"""


def write_folder(path: Path, found: Iterator[Sample]) -> int:
    """Images, and their captions in a metadata.jsonl; how many."""
    path.mkdir()
    rows = []
    for sample in found:
        (path / f"{sample.key}.png").write_bytes(sample.png())
        rows.append(json.dumps({"file_name": f"{sample.key}.png", **sample.about}, ensure_ascii=False) + "\n")
    (path / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return len(rows)


def write_shards(path: Path, found: Iterator[Sample]) -> int:
    """Tars of at most `SHARD` samples, each image beside a .json; how many samples."""
    path.mkdir()
    count = 0
    while some := list(islice(found, SHARD)):
        with tarfile.open(path / f"{count // SHARD:05}.tar", "w") as tar:
            for sample in some:
                about = json.dumps(sample.about, ensure_ascii=False).encode()
                for ending, content in (("png", sample.png()), ("json", about)):
                    member = tarfile.TarInfo(f"{sample.key}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        count += len(some)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder with the unpacked packages")
    parser.add_argument("out", type=Path, help="a folder to make")
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), help="default: all")
    parser.add_argument("--grounds", type=int, default=1, help="coloured grounds of each picture, beside white")
    parser.add_argument("--tar", action="store_true", help="tar shards, not folders with metadata.jsonl")
    args = parser.parse_args()
    needed = [LABELS, *(STYLES[style].pictures for style in args.styles)]
    for missing in (args.packages / place for place in needed if not (args.packages / place).is_dir()):
        parser.exit(2, f"emoji.py: no folder {missing}; fetch and unpack the packages as emoji.py --help says\n")
    try:
        args.out.mkdir(parents=True)
        (args.out / "CREDITS.txt").write_text(CREDITS, encoding="utf-8")
        for part, test in (("train", False), ("test", True)):
            found = (s for s in samples(args.packages, args.styles, args.grounds) if s.test == test)
            count = (write_shards if args.tar else write_folder)(args.out / part, found)
            sys.stdout.write(f"{args.out / part}: {count:,} pictures\n")
    except FileExistsError:
        parser.exit(2, f"emoji.py: {args.out} exists; name another place, or delete it\n")
    except OSError as error:
        parser.exit(2, f"emoji.py: {error.filename or args.out}: {error.strerror}\n")


if __name__ == "__main__":
    main()
