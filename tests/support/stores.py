"""A store that fails on demand, for fsspec: files in a dict, under ``fragile://``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

from fsspec import AbstractFileSystem


class Fragile(AbstractFileSystem):
    """Without a rename of its own, and with files that grow while they are written, as in many a store."""

    protocol = "fragile"
    files: ClassVar[dict[str, bytes]] = {}
    read_only: ClassVar[bool] = False
    write_limit: ClassVar[int | None] = None  # bytes that a file may get before the connection is lost
    read_limit: ClassVar[int | None] = None
    faults: ClassVar[int] = -1  # reads that fail before they work again; -1: all beyond the limit
    asked: ClassVar[list[tuple[str, int | None, int | None]]] = []  # names and ranges that were read

    @classmethod
    def reset(cls) -> None:
        cls.files, cls.read_only, cls.write_limit, cls.read_limit, cls.faults, cls.asked = (
            {},
            False,
            None,
            None,
            -1,
            [],
        )

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.rpartition("://")[2].rpartition("@")[2].partition("?")[0].strip("/")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path in self.files:
            return {"name": path, "size": len(self.files[path]), "type": "file"}
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        below = [name.removeprefix(f"{path}/") for name in self.files if name.startswith(f"{path}/")]
        names = {f"{path}/{name.split('/')[0]}" for name in below}
        found = [self.info(name) for name in sorted(names)] or [self.info(path)]
        return found if detail else [entry["name"] for entry in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        path = self._strip_protocol(path)
        type(self).asked.append((path, start, end))
        content = self.files[path][start:end] if path in self.files else self.info(path)
        if self.read_limit is not None and len(content) > self.read_limit and self._faulty():
            raise ConnectionResetError("the store went away")
        return content

    def _faulty(self) -> bool:
        if self.faults == 0:
            return False
        type(self).faults -= self.faults > 0
        return True

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "rb":
            self.asked.append((path, None, None))
            self.info(path)
            return _Reader(self.files[path], self.read_limit)
        if self.read_only:
            raise PermissionError("AccessDenied")
        return _Writer(self, path)

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        self.files[self._strip_protocol(path2)] = self.files[self._strip_protocol(path1)]

    def rm_file(self, path: str) -> None:
        del self.files[self._strip_protocol(path)]


class Whole(Fragile):
    """An object store: an upload is there as a whole or not at all, and buckets are made by nobody."""

    protocol = "s3"

    def put_file(self, local: str, name: str, **kwargs: Any) -> None:
        content = Path(local).read_bytes()
        if self.write_limit is not None and len(content) > self.write_limit:
            raise ConnectionResetError("the store went away")
        self.files[name] = content

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError(f"{path} would become a bucket")


class _Reader(io.BytesIO):
    def __init__(self, content: bytes, limit: int | None) -> None:
        super().__init__(content)
        self.limit, self.size = limit, len(content)

    def read(self, count: int | None = -1) -> bytes:
        if self.limit is not None and self.tell() + (count or 0) > self.limit:
            raise ConnectionResetError("the store went away")
        return super().read(count)


class _Writer(io.RawIOBase):
    def __init__(self, store: Fragile, path: str) -> None:
        self.store, self.path = store, path
        store.files[path] = b""

    def write(self, piece: Any) -> int:
        content = self.store.files[self.path] + bytes(piece)
        limit = self.store.write_limit
        self.store.files[self.path] = content[:limit]
        if limit is not None and len(content) > limit:
            raise ConnectionResetError("the store went away")
        return len(piece)


class Lying(AbstractFileSystem):
    """Under ``lying://vault/runs`` a folder that lists whatever it is told to.

    A file's content is that of its suffix.
    ``entries`` are handed out as they are: names that lead anywhere, types and sizes that are not true.
    """

    protocol = "lying"
    cachable = False
    folder: ClassVar[str] = "vault/runs"
    entries: ClassVar[list[Any]] = []
    contents: ClassVar[dict[str, bytes]] = {}  # by suffix

    @classmethod
    def tell(cls, names: list[str], content: bytes = b"", **more: Any) -> None:
        """List files of these names in the folder, all with the same content."""
        cls.contents = dict.fromkeys((Path(name).suffix for name in names), content)
        entry = {"size": len(content), "type": "file", **more}
        cls.entries = [{"name": f"{cls.folder}/{name}", **entry} for name in names]

    def _content(self, path: str) -> bytes:
        suffix = Path(path).suffix
        if suffix not in self.contents:
            raise FileNotFoundError(path)
        return self.contents[suffix]

    def info(self, path: str, **kwargs: Any) -> Any:
        path = self._strip_protocol(path).rstrip("/")
        if path == self.folder:
            return {"name": path, "size": 0, "type": "directory"}
        content = self._content(path)
        listed = (entry for entry in self.entries if isinstance(entry, dict) and entry.get("name") == path)
        return next(listed, {"name": path, "size": len(content), "type": "file"})

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        return self.entries if detail else [entry["name"] for entry in self.entries]

    def find(self, path: str, maxdepth: int | None = None, detail: bool = False, **kwargs: Any) -> Any:
        return {entry["name"]: entry for entry in self.entries}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return self._content(path)[start:end]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return io.BytesIO(self._content(path))

    def get_file(self, path: str, target: str, **kwargs: Any) -> None:
        Path(target).write_bytes(self._content(path))  # follows links, as the clients of stores do
