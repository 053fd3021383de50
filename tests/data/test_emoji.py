"""examples/emoji.py on made-up packages of the real ones' layout: captions, grounds, held-out pairs, both forms."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from data.test_sources import as_files
from pixelgrow.data import open_source
from pixelgrow.data.sources.base import wordings_of

SCRIPT = Path(__file__).parents[2] / "examples" / "emoji.py"
GROUPS = ("smileys-emotion", "people-body", "component", "animals-nature", "food-drink", "travel-places", "flags")
# Hexcode: label, group, colour of its picture, and the style that is held out, pinned here: the hexcode decides it.
CONCEPTS = {
    "1F34E": ("red apple", 4, "#d01020", ""),
    "1F34F": ("green apple", 4, "#20a040", "noto"),
    "1F415": ("dog", 3, "#906040", "twemoji"),
    "1F410": ("goat", 3, "#e0e0e0", "fluent"),
    "1F9D0": ("face with monocle", 0, "#f0c040", ""),
    "2708-FE0F": ("airplane", 5, "#8090a0", ""),
    "1F1E9-1F1EA": ("flag: Germany", 6, "black", ""),
    "1F3FB": ("light skin tone", 2, "#f0d0b0", ""),
    "1F468-200D-1F466": ("family: man, boy", 1, "blue", ""),
    "1F9D1-200D-1F384": ("Mx Claus", 1, "red", ""),
    "1F7E5": ("red square", 4, "red", "fluent"),
}
USED = ("1f34e", "1f34f", "1f415", "1f410", "1f9d0", "2708", "1f7e5")


def picture(path: Path, side: int, colour: str, whole: bool) -> None:
    image = Image.new("RGBA", (side, side), colour if whole else (0, 0, 0, 0))
    image.paste(colour, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    image.putpixel((side // 2, side // 2), (len(path.name) % 7, int(path.stem[-2:], 16), side))  # no two are the same
    image.save(path, lossless=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    data = folder / "emojibase-data-17.0.0/package/en"
    data.mkdir(parents=True)
    rows = [
        {"hexcode": code, "label": label, "group": group, "order": 100 - i, "skins": [{"hexcode": f"{code}-1F3FB"}]}
        for i, (code, (label, group, *_)) in enumerate(CONCEPTS.items())
    ]
    rows.append({"hexcode": "1F1E6", "label": "regional indicator A"})  # has neither group nor order
    (data / "data.json").write_text(json.dumps(rows))
    groups = [{"key": key, "order": i} for i, key in enumerate(GROUPS)]
    (data / "messages.json").write_text(json.dumps({"groups": groups}))
    for style, side, end in (
        ("lobehub-fluent-emoji-3d-1.1.0/package/assets", 32, "webp"),
        ("emoji-datasource-google-16.0.0/package/img/google/64", 16, "png"),
        ("emoji-datasource-twitter-16.0.0/package/img/twitter/64", 16, "png"),
    ):
        (folder / style).mkdir(parents=True)
        for code, (label, _, colour, _) in CONCEPTS.items():
            name = code.lower().removesuffix("-fe0f") if end == "webp" else code.lower()  # as the packages differ
            if (label, end) != ("airplane", "webp"):  # Fluent lacks some
                picture(folder / style / f"{name}.{end}", side, colour, label == "red square")
                picture(folder / style / f"{name}-1f3fb.{end}", side, colour, False)
    return folder


def make(packages: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(packages), str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "emoji"
    done = make(packages, out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}/train: 30 pictures\n{out}/test: 4 pictures\n"
    return out


def rows_of(folder: Path) -> dict[str, dict[str, object]]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"].removesuffix(".png"): row for row in map(json.loads, lines)}


def test_pairs_of_concept_and_style_are_held_out(made: Path) -> None:
    train, test = ({(r["concept"], r["style"]) for r in rows_of(made / part).values()} for part in ("train", "test"))
    styles = {"fluent", "noto", "twemoji"}
    every = {(code, style) for code in USED for style in styles} - {("2708", "fluent")}
    assert test == {("1f34f", "noto"), ("1f415", "twemoji"), ("1f410", "fluent"), ("1f7e5", "fluent")}
    assert train == every - test
    assert all(row["ground"] == "white" for row in rows_of(made / "test").values())


def test_captions_say_what_is_seen(made: Path) -> None:
    rows = rows_of(made / "train")
    assert rows["fluent-1f34e-white"] == {
        "file_name": "fluent-1f34e-white.png",
        "text": [
            "fluent 3d emoji of a red apple",
            "a red apple, fluent 3d style",
            "fluent 3d emoji of a red apple on a white background",
            "a red apple",
            "red apple",
        ],
        "concept": "1f34e",
        "style": "fluent",
        "ground": "white",
        "group": "food-drink",
    }
    assert rows["noto-2708-white"]["text"] == [
        "noto emoji of an airplane",
        "noto emoji of a plane",  # a keyword
        "an airplane, noto style",
        "noto emoji of an airplane on a white background",
    ]
    for key, row in rows.items():
        texts, ground = row["text"], row["ground"]
        assert isinstance(texts, list) and key == f"{row['style']}-{row['concept']}-{ground}"
        named = [row["style"] in text for text in texts]
        assert all(named) or row["style"] == "fluent"
        article = "an" if ground == "orange" else "a"
        assert ground == "white" or all(f" on {article} {ground} background" in text for text in texts)


def test_the_ground_is_the_one_that_is_named(made: Path) -> None:
    coloured = 0
    for key, row in rows_of(made / "train").items():
        with Image.open(made / "train" / f"{key}.png") as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert image.size == ((32, 32) if row["style"] == "fluent" else (16, 16))
            corner = image.getpixel((0, 0))
        if row["concept"] == "1f7e5":
            assert row["ground"] == "white"  # none of another would be seen
            continue
        coloured += row["ground"] != "white"
        assert (corner == (255, 255, 255)) == (row["ground"] == "white")
        assert (row["concept"], row["ground"]) not in {("1f34e", "red"), ("1f415", "brown"), ("1f9d0", "yellow")}
    assert coloured == 14  # one for each picture in training


def test_a_run_reads_the_training_part(made: Path) -> None:
    source = open_source(str(made))
    assert len(source) == 30 and not source.bad  # type: ignore[attr-defined]
    assert "heldout: {source: " + str(made / "test") + "} holds it out" in source.guess  # type: ignore[attr-defined]
    assert [w.text for w in wordings_of(source, 0)] == rows_of(made / "train")[source.key(0)[:-4]]["text"]
    for words in ("Microsoft", "MIT License", "Apache License 2.0", "CC BY 4.0", "laid on a flat ground"):
        assert words in (made / "CREDITS.txt").read_text(encoding="utf-8")


def test_shards_hold_the_same(made: Path, packages: Path, tmp_path: Path) -> None:
    assert make(packages, tmp_path / "tars", "--tar").returncode == 0
    for part in ("train", "test"):
        tars, folder = as_files(tmp_path / "tars" / part), as_files(made / part)
        assert [path.name for path in (tmp_path / "tars" / part).glob("[!.]*")] == ["00000.tar"] and not tars.bad
        ours = {tars.key(i).removeprefix("00000.tar/"): (tars.read(i), tars.wordings(i)) for i in range(len(tars))}
        assert ours == {folder.key(i): (folder.read(i), folder.wordings(i)) for i in range(len(folder))}


def test_one_style_alone_has_the_same_pairs(made: Path, packages: Path, tmp_path: Path) -> None:
    assert make(packages, tmp_path / "one", "--styles", "fluent", "--grounds", "2").returncode == 0
    for part in ("train", "test"):
        ours, all_styles = rows_of(tmp_path / "one" / part), rows_of(made / part)
        fluent = {key: row for key, row in all_styles.items() if row["style"] == "fluent"}
        assert {row["concept"] for row in ours.values()} == {row["concept"] for row in fluent.values()}
        assert fluent.items() <= ours.items()
    assert sum(row["ground"] != "white" for row in rows_of(tmp_path / "one" / "train").values()) == 8


def test_mistakes_are_one_line(packages: Path, made: Path, tmp_path: Path) -> None:
    done = make(tmp_path, tmp_path / "out")
    assert (done.returncode, done.stdout, (tmp_path / "out").exists()) == (2, "", False)
    assert done.stderr.startswith(f"emoji.py: no folder {tmp_path}/emojibase-data-17.0.0/package/en; fetch and unpack")
    done = make(packages, made)
    assert (done.returncode, done.stderr) == (2, f"emoji.py: {made} exists; name another place, or delete it\n")


@pytest.fixture(scope="module")
def emoji() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emoji_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("unicorn", "a unicorn"),
        ("umbrella with rain drops", "an umbrella with rain drops"),
        ("ewe", "a ewe"),
        ("NG button", "an NG button"),
        ("octopus", "an octopus"),
        ("grapes", "grapes"),
        ("shaved ice", "shaved ice"),
        ("sheaf of rice", "a sheaf of rice"),
        ("cloud with lightning and rain", "a cloud with lightning and rain"),
        ("eye in speech bubble", "an eye in a speech bubble"),
        ("women with bunny ears", "women with bunny ears"),
        ("woman rowing boat", "a woman rowing a boat"),
        ("person lifting weights", "a person lifting weights"),
        ("man judge", "a male judge"),
        ("woman dancing", "a woman dancing"),
        ("person: beard", "a person with a beard"),
        ("woman: red hair", "a woman with red hair"),
        ("man: bald", "a bald man"),
        ("man running: facing right", "a man running, facing right"),
        ("kiss: man, man", "two men kissing"),
        ("couple with heart: woman, man", "a woman and a man with a heart"),
        ("three o’clock", "a clock at three o'clock"),
        ("keycap: 7", "a key with the number 7"),
        ("keycap: #", "a key with a hash sign"),
        ("AB button (blood type)", "a blood type AB button"),
        ("Japanese “here” button", 'a Japanese "here" button'),
    ],
)
def test_labels_become_what_people_say(emoji: ModuleType, label: str, name: str) -> None:
    assert emoji.said(label, {"judge"}) == name


def test_names_are_read(emoji: ModuleType) -> None:
    names = emoji.read_names()
    assert names["crying cat"] == ("", "a sad cat", "a sad cat with a tear") and names["pizza"][0] == "a slice of pizza"
    assert names["Mx Claus"] == () and all(name for some in names.values() for name in some[1:])
    assert emoji.bare("a hand pointing up, seen from the back") == "hand pointing up, seen from the back"


def test_a_picture_that_a_style_draws_twice_has_one_name(emoji: ModuleType, packages: Path, tmp_path: Path) -> None:
    other = tmp_path / "packages"
    for path in sorted(p for p in packages.rglob("*") if p.is_file()):
        copy = other / path.relative_to(packages)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    noto = other / emoji.STYLES["noto"].pictures
    (noto / "1f34e.png").write_bytes((noto / "1f9d0.png").read_bytes())
    found = {s.about["concept"] for s in emoji.samples(other, ["noto"], 0)}
    assert found == set(USED) - {"1f34e"}  # the order of Unicode has the face first


def test_a_ground_is_a_colour_that_the_picture_can_be_told_from(emoji: ModuleType) -> None:
    picture = Image.new("RGBA", (64, 64))
    for i, colour in enumerate(("red", "blue", "black", "black")):
        picture.paste((*emoji.GROUNDS[colour], 255), (8, 12 * i, 56, 12 * i + 12))
    assert set(emoji.grounds(picture, "seed", 99)) == {"white", *emoji.GROUNDS} - {"red", "blue", "black"}
    picture.paste((*emoji.GROUNDS["pink"], 255), (8, 0, 56, 64))
    picture.paste((*emoji.GROUNDS["red"], 255), (30, 20, 45, 35))  # a little red may be hidden
    assert set(emoji.grounds(picture, "seed", 99)) == {"white", *emoji.GROUNDS} - {"pink"}
    drawn = [emoji.grounds(picture, f"seed {i}", 1) for i in range(40)]
    assert all(len(some) == 2 and some[0] == "white" for some in drawn) and len({some[1] for some in drawn}) > 5


def test_transparent_parts_alone_are_the_ground(emoji: ModuleType) -> None:
    picture = Image.new("RGBA", (4, 4), (10, 20, 30, 255))
    picture.putpixel((0, 0), (10, 20, 30, 0))
    with Image.open(io.BytesIO(emoji.Sample("a", picture, {"ground": "pink"}, False).png())) as image:
        assert image.getpixel((0, 0)) == emoji.GROUNDS["pink"] and image.getpixel((1, 0)) == (10, 20, 30)
