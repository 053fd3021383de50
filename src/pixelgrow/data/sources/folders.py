"""Folders of images: with a caption file beside each, with one folder per class, or without captions."""

import os
from array import array

from pixelgrow.data.images import BadImage
from pixelgrow.data.sources.base import Wording
from pixelgrow.data.sources.captions import MAX_CAPTION, MAX_JSON, Captions, flat, from_json, from_text, wordings_from
from pixelgrow.data.sources.files import is_image, key_of, open_regular, read_regular, walk
from pixelgrow.data.sources.index import CAPTIONS, FURTHER, LOOSE, NEITHER, VECTOR, FileSource, Scan, Strings
from pixelgrow.data.sources.names import JSON, SVG, TEXT, match, suffix_of
from pixelgrow.errors import UserError


class Folder(FileSource):
    """A source whose samples are image files in a folder, with folders in it or not."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._root = os.fsencode(path)
        self._keys = Strings()  # paths of the images as they are on the disk

    def key(self, i: int) -> str:
        return key_of(self._keys[i])

    def read(self, i: int) -> bytes:
        return read_regular(os.path.join(self._root, self._keys[i]))


class PairedFolder(Folder):
    """A folder of images with a caption file beside each, .txt or .json (`names.match`).

    A .txt has a caption on each line, a .json a text or a list of them under text, caption or prompt.
    """

    kind = ".txt beside the image"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._captions = Strings()  # names of the caption files
        scan = Scan(path)
        for folder, names in walk(self._root, scan.reject):
            self._take(scan, folder, names)
        self._finish(scan)

    def _take(self, scan: Scan, folder: bytes, names: list[bytes]) -> None:
        """Take the samples of one folder into the index."""
        keys = [key_of(folder + name) for name in names]
        found = match(keys, lambda i: is_image(os.path.join(self._root, folder, names[i])))
        for image, caption in found.pairs:
            path = folder + names[image]
            try:
                captions = self._read(folder + names[caption])
                with open_regular(os.path.join(self._root, path)) as file:
                    scan.admit(file, keys[image].encode(errors="surrogatepass"), *_bytes(captions))
            except BadImage as error:
                scan.reject(keys[image], error.reason)
                continue
            scan.note(captions)
            self._keys.append(path)
            self._captions.append(names[caption])
        for i, reason in found.faults.items():
            scan.reject(keys[i], reason)
        for i, reason in found.strays.items():
            scan.stray(keys[i], reason)
        for i in found.others:
            scan.pass_over(NEITHER, keys[i])
        for i in found.further:
            scan.pass_over(FURTHER, keys[i])
        for i in found.vectors:
            scan.pass_over(VECTOR, keys[i])

    def _read(self, path: bytes) -> Captions:
        is_json = suffix_of(key_of(path)) == JSON
        try:
            with open_regular(os.path.join(self._root, path)) as file:
                raw = file.read((MAX_JSON if is_json else MAX_CAPTION) + 1)
        except BadImage as error:
            raise BadImage(f"caption: {error.reason}") from None
        return from_json(raw) if is_json else from_text(raw)

    def text(self, i: int) -> str:
        return self._said(i)[0]

    def wordings(self, i: int) -> tuple[Wording, ...]:
        return wordings_from(self._said(i))

    def _said(self, i: int) -> tuple[str, ...]:
        path = os.path.join(os.path.dirname(self._keys[i]), self._captions[i])
        return self._again(i, os.path.join(self.name, key_of(path)), lambda: flat(self._read(path).wordings))


class ClassFolder(Folder):
    """A folder with one folder per class, each with images in it at any depth.

    A sample's text is its label, a decimal; `classes[label]` is the class's name. Labels are in order of the folders'
    names: NFC, by code point, in any locale.
    """

    kind = "class folders"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._labels = array("i")
        classes: dict[str, tuple[int, bytes]] = {}  # name: label, folder
        scan = Scan(path)
        for folder, names in walk(self._root, scan.reject):
            top = folder.split(b"/", 1)[0]
            for name in names:
                key = folder + name
                if not is_image(os.path.join(self._root, key)):
                    scan.pass_over(CAPTIONS if suffix_of(key_of(key)) == TEXT else NEITHER, key_of(key))
                    continue
                if suffix_of(key_of(key)) == SVG:
                    scan.pass_over(VECTOR, key_of(key))
                    continue
                if not top:
                    scan.stray(key_of(key), LOOSE)
                    continue
                try:
                    label = self._label(top, classes)
                    with open_regular(os.path.join(self._root, key)) as file:
                        scan.admit(file, key_of(key).encode(errors="surrogatepass"), str(label).encode())
                except BadImage as error:
                    scan.reject(key_of(key), error.reason)
                    continue
                self._keys.append(key)
                self._labels.append(label)
        self.classes = tuple(classes)
        self._finish(scan)

    def _label(self, folder: bytes, classes: dict[str, tuple[int, bytes]]) -> int:
        """The label of a class's folder, the next one for a new class: the walk has them in order.

        Raises UserError for a name that is no text: checkpoints keep it as text.
        """
        name = key_of(folder)
        label, known = classes.setdefault(name, (len(classes), folder))
        if known != folder:
            raise UserError(
                f"{self.name}: two class folders are named {name}, in two Unicode forms (NFC and NFD): rename one, or "
                "put their images together"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{self.name}: the class folder {folder!r} has a name that is not UTF-8, and a checkpoint keeps the "
                "names of its classes: rename the folder"
            ) from None
        return label

    def text(self, i: int) -> str:
        return str(self._labels[i])


class ImageFolder(Folder):
    """A folder of images without captions, at any depth: every text is empty. For evaluation; no stage trains on it."""

    kind = "images without captions"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        scan = Scan(path)
        for folder, names in walk(self._root, scan.reject):
            for name in names:
                key = folder + name
                if not is_image(os.path.join(self._root, key)) or suffix_of(key_of(key)) == SVG:
                    scan.pass_over(VECTOR if suffix_of(key_of(key)) == SVG else NEITHER, key_of(key))
                    continue
                try:
                    with open_regular(os.path.join(self._root, key)) as file:
                        scan.admit(file, key_of(key).encode(errors="surrogatepass"))
                except BadImage as error:
                    scan.reject(key_of(key), error.reason)
                    continue
                self._keys.append(key)
        self._finish(scan)

    def text(self, i: int) -> str:
        return ""


def _bytes(captions: Captions) -> list[bytes]:
    return [text.encode() for text in flat(captions.wordings)]
