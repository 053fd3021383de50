"""Make a small captioned set of real photographs: crops of pictures that scikit-image carries.

    python examples/photographs.py photographs              # a folder with metadata.jsonl
    python examples/photographs.py photographs.tar          # the same as a tar shard, key.jpg beside key.txt

Needs the `bench` extra (scikit-image). Nothing is downloaded.
"""

import argparse
import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import skimage
from PIL import Image

# File, what is on it, and the least share of the shorter side that a crop keeps, so that what is named stays in sight.
PICTURES = {
    "astronaut.png": ("a woman in an orange space suit, smiling", "an astronaut in front of a flag"),
    "chelsea.png": ("the face of a ginger cat", "a cat with green eyes looking up"),
    "coffee.png": ("a cup of coffee on a wooden table", "an espresso cup with a spoon on a saucer"),
    "rocket.jpg": ("a rocket on its launch pad at dusk", "a white rocket before the launch"),
    "motorcycle_left.png": ("a motorcycle in a garage", "a red motorcycle seen from the side"),
    "hubble_deep_field.jpg": ("galaxies in deep space", "stars and galaxies on a black sky"),
    "moon.png": ("the surface of the moon", "craters on the moon in black and white"),
    "coins.png": ("old coins on a dark cloth", "rows of ancient greek coins"),
    "brick.png": ("a brick wall", "a wall of bricks in black and white"),
    "grass.png": ("a lawn seen from above", "blades of grass in black and white"),
    "ihc.png": ("cells of a tissue, stained brown and blue", "a microscope picture of stained tissue"),
    "retina.jpg": ("the retina of an eye", "blood vessels at the back of an eye"),
}
LEAST = 0.7


def crops(n: int, side: int) -> Iterator[tuple[str, bytes, str]]:
    """n crops of each picture as (key, JPEG, caption); the same on every call."""
    folder = Path(skimage.__file__).parent / "data"
    for name, captions in PICTURES.items():
        picture = Image.open(folder / name).convert("RGB")
        rng = random.Random(name)
        for i in range(n):
            size = round(min(picture.size) * rng.uniform(LEAST, 1.0))
            x, y = (rng.randint(0, full - size) for full in picture.size)
            crop = picture.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + size, y + size), reducing_gap=3.0)
            data = io.BytesIO()
            crop.save(data, "JPEG", quality=92)
            yield f"{Path(name).stem}_{i:04d}", data.getvalue(), rng.choice(captions)


def write_shard(path: Path, samples: Iterator[tuple[str, bytes, str]]) -> None:
    """Each image beside its caption, in a tar."""
    with tarfile.open(path, "w") as tar:
        for key, data, caption in samples:
            for ending, content in (("jpg", data), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_folder(path: Path, samples: Iterator[tuple[str, bytes, str]]) -> None:
    """Images, and their captions in a metadata.jsonl. Raises FileExistsError if the folder is there."""
    path.mkdir(parents=True)
    rows = []
    for key, data, caption in samples:
        (path / f"{key}.jpg").write_bytes(data)
        rows.append(json.dumps({"file_name": f"{key}.jpg", "text": caption}))
    (path / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder to make, or a file that ends in .tar")
    parser.add_argument("-n", type=int, default=120, help="crops of each picture")
    parser.add_argument("--side", type=int, default=160, help="pixels")
    args = parser.parse_args()
    try:
        (write_shard if args.out.suffix == ".tar" else write_folder)(args.out, crops(args.n, args.side))
    except OSError as error:
        parser.exit(2, f"photographs.py: cannot write {args.out}: {error.strerror}; name another place, or delete it\n")


if __name__ == "__main__":
    main()
