"""Secrets in URLs: whatever they are made of, wherever they are and whoever quotes them, nobody sees them."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

import fsspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from ckpt_tools.cli import main
from ckpt_tools.errors import UsageError
from ckpt_tools.redaction import presentable, remember_secret, remembering, without_fragments, without_secrets
from ckpt_tools.storage.contents.recorded_values import plain_words
from ckpt_tools.urls import is_url, parse_url, redact_url, remember_url, remember_urls

FRAGMENT = 6  # characters in a row that tell something of a secret


class Closed(fsspec.AbstractFileSystem):
    """A store that lets nobody in, and quotes what it was asked for in one way or another."""

    protocol = "closed"
    cachable = False
    quoting: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.partition("://")[2] or path

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        pieces = path.replace("@", " ").replace("?", " ").replace(":", " ").split()
        ways = (
            path,
            repr(path),
            quote(path),
            unquote(path),
            path.lower(),
            json.dumps({"url": path}),
            " ".join(pieces),
        )
        ways += (
            path[len(path) // 3 :],
            path[: 2 * len(path) // 3],
            max(pieces, key=len, default=""),
            ascii(path),
        )
        raise PermissionError(f"no access to {ways[self.quoting % len(ways)]} for you")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        return [self.info(path)]


@pytest.fixture(autouse=True)
def _closed_store() -> None:
    fsspec.register_implementation("closed", Closed, clobber=True)


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a checkpoint and data, so that only the URL is wrong."""
    monkeypatch.chdir(tmp_path)
    torch.save({"bn.running_var": torch.ones(2)}, "net.pt")
    np.save("data.npy", np.zeros((4, 3, 8, 8), np.float32))


# No control characters: a terminal's user can hardly type them, and the operating system refuses NUL.
characters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])
odd = st.sampled_from(" /\\@#?&=%:;,+\"'`$(){}[]<>|~^*!0123456789") | characters
secrets = st.text(odd, min_size=8, max_size=24).filter(
    lambda text: text == text.strip() and len(set(text)) > 3
)
SHAPES = {
    "password": "closed://user:{}@127.0.0.1/x.pt",
    "password and port": "ftp://user:{}@127.0.0.1:1/x.pt",
    "password, upper case": "CLOSED://user:{}@bucket/x.pt",
    "token": "closed://{}@bucket/x.pt",
    "token as user name": "http://{}:x-oauth-basic@127.0.0.1:1/x.pt",
    "query": "http://127.0.0.1:1/x.pt?sig={}",
    "query of a store": "closed://bucket/x.pt?a=1&sig={}",
    "query without a name": "closed://bucket/x.pt?{}",
    "fragment": "closed://bucket/x.pt#{}",
    "parameter": "http://127.0.0.1:1/x.pt;token={}",
    "chain": "simplecache::closed://user:{}@bucket/x.pt",
    "chain of three": "zip://x.pt::filecache::closed://user:{}@bucket/x.zip",
    "one slash": "closed:/user:{}@bucket/x.pt",
    "no slash": "closed:user:{}@bucket/x.pt",
    "three slashes": "closed:///user:{}@bucket/x.pt",
    "backslashes": "closed:\\\\user:{}@bucket\\x.pt",
    "no colon": "http//user:{}@127.0.0.1/x.pt",
    "as scp": "user:{}@127.0.0.1:/x.pt",
    "unknown store": "cl0sed://user:{}@bucket/x.pt",
    "behind a blank": " closed://user:{}@bucket/x.pt",
    "port and path": "closed://user:5/{}@127.0.0.1:1/x.pt",
}
ROADS: tuple[tuple[str, ...], ...] = (
    ("inspect", "{}"),
    ("convert", "{}"),
    ("diff", "net.pt", "{}"),
    ("convert", "net.pt", "-o", "{}"),
    ("convert", "net.pt", "--output={}"),
    ("bn-reestimate", "net.pt", "--arch", "nets:DenseNet", "--input-size", "3,8,8", "--data", "{}"),
    ("bn-reestimate", "net.pt", "--data", "data.npy", "--report", "{}"),
    ("bn-reestimate", "net.pt", "--data", "data.npy", "--manifest", "{}"),
    ("bn-reestimate", "net.pt", "--data", "data.npy", "--output-dir", "{}"),
    ("bn-reestimate", "net.pt", "--data", "data.npy", "--engine", "ray", "--ray-address", "{}"),
    (
        "evaluate",
        "net.pt",
        "--arch",
        "nets:DenseNet",
        "--input-size",
        "3,8,8",
        "--data",
        "data.npy",
        "--class-map",
        "{}",
    ),
    ("evaluate", "net.pt", "--data", "cifar10:{}"),
    ("init-rewrite", "{}", "--data", "{}"),
    ("inspect", "net.pt", "{}"),  # one argument too many
    ("inspect", "net.pt", "--{}"),
    ("inspect", "net.pt", "--input-size", "{}"),
    ("{}",),
)


def leaked(secret: str, text: str) -> list[str]:
    """Parts of a secret in a text, which may quote or escape it."""
    seen = f"{text}\n{unquote(text)}".lower()
    parts = {secret[start : start + FRAGMENT].lower() for start in range(len(secret) - FRAGMENT + 1)}
    return sorted(part for part in parts if part in seen)


def told(arguments: list[str], **environment: str) -> str:
    """All that a command says; an unexpected exception is what Python would print of it."""
    result = CliRunner().invoke(main, arguments, env=environment)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    return str(result.output)


@pytest.mark.usefixtures("_here")
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(secrets, st.sampled_from(sorted(SHAPES)), st.sampled_from(ROADS), st.integers(0, 10), st.booleans())
@example("5/s3kr1t+x", "password", ROADS[0], 0, False)
@example("pa s3kr1t", "password and port", ROADS[0], 0, False)
@example("a'b\"s3kr1t", "query", ROADS[0], 0, True)
@example("s3::kr1t::x", "password", ROADS[0], 1, False)
@example("h#sh?qu/s3kr1t@x", "password", ROADS[5], 6, True)
@example("s3kr1ttoken", "query", ROADS[3], 9, True)
@example("/s3kr1tx", "no colon", ROADS[0], 0, False)
@example("\\s3kr1tx", "as scp", ROADS[0], 0, False)
@example("0@s3kr1t1#", "token", ROADS[0], 0, False)
def test_no_command_shows_a_secret(
    secret: str, shape: str, road: tuple[str, ...], quoting: int, in_github: bool
) -> None:
    Closed.quoting = quoting
    url = SHAPES[shape].format(secret)
    environment = {"CKPT_FIX_TRACEBACK": "1", **({"GITHUB_ACTIONS": "true"} if in_github else {})}
    output = told([word.format(url) for word in road], **environment)
    if parts := leaked(secret, output):  # it may be in our own words, too
        other = told([word.format(SHAPES[shape].format("\u2603" * 12)) for word in road], **environment)
        assert not [part for part in parts if part not in other.lower()], output


@settings(max_examples=300)
@given(secrets, st.sampled_from(sorted(SHAPES)))
def test_what_is_shown_of_a_url(secret: str, shape: str) -> None:
    url = SHAPES[shape].format(secret)
    assume(is_url(url))
    assert not leaked(secret, redact_url(url).partition("://")[2].replace("127.0.0.1:1/x.pt", ""))


@settings(max_examples=300)
@given(secrets, st.sampled_from(sorted(SHAPES)), st.text(max_size=20), st.text(max_size=20))
def test_what_a_client_says(secret: str, shape: str, before: str, after: str) -> None:
    assume(not leaked(secret, f"{before} {after} x.pt 127.0.0.1:1/x.pt"))
    with remembering():
        remember_urls([SHAPES[shape].format(secret)])
        for spelling in (
            secret,
            quote(secret),
            quote(secret, safe=""),
            repr(secret),
            json.dumps(secret),
            secret[:-1],
        ):
            shown = without_fragments(f"{before} {spelling} {after}")
            assert not [part for part in leaked(secret, shown) if part not in f"{before} {after}".lower()], (
                shown
            )


@pytest.mark.parametrize(
    ("url", "shown", "path", "query"),
    [
        ("s3://bucket/key.pt", "s3://bucket/key.pt", "bucket/key.pt", ""),
        ("S3://bucket/key.pt", "s3://bucket/key.pt", "bucket/key.pt", ""),
        (
            "https://me:pw@host:8080/a/b.pt?sig=1#x",
            "https://host:8080/a/b.pt",
            "host:8080/a/b.pt",
            "?sig=1#x",
        ),
        ("https://host.org/@me/x.pt", "https://host.org/@me/x.pt", "host.org/@me/x.pt", ""),
        ("http://127.0.0.1:8000/a@b.pt", "http://127.0.0.1:8000/a@b.pt", "127.0.0.1:8000/a@b.pt", ""),
        ("hf://org/repo@main/x.pt", "hf://org/repo@main/x.pt", "org/repo@main/x.pt", ""),
        ("s3://bucket/a@b.pt", "s3://bucket/a@b.pt", "bucket/a@b.pt", ""),
        ("http://host/x.pt;token=abc", "http://host/x.pt", "host/x.pt", ";token=abc"),
        ("s3://bucket/lr=1;wd=2.pt", "s3://bucket/lr=1;wd=2.pt", "bucket/lr=1;wd=2.pt", ""),
        ("hdfs:///runs/x.pt", "hdfs:///runs/x.pt", "runs/x.pt", ""),
        ("s3://arn:aws:s3:us-east-1:1:accesspoint/x.pt",) * 2
        + ("arn:aws:s3:us-east-1:1:accesspoint/x.pt", ""),
        ("ftp://me:a b\"c'd@host/x.pt", "ftp://host/x.pt", "host/x.pt", ""),
    ],
)
def test_urls_that_can_be_read(url: str, shown: str, path: str, query: str) -> None:
    address = parse_url(url)
    assert (redact_url(url), address.path, address.query) == (shown, path, query)
    assert f"{address.origin.with_credentials}{address.path}{address.query}".lower() == url.lower()
    assert f"{address.origin.shown}{address.path}" == shown


@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:5/x@host/x.pt",
        "closed://KEY:8/x+y@bucket/x.pt",
        "s3://KEY:SEC/RET@bucket/x.pt",
        "https://TO/KEN@host/x.pt",
        "https://user:pa#ss@host/x.pt",
        "https://user:pa?ss@host/x.pt",
        "https://user:pass/x.pt",
        "https://[::1]/x.pt",
        "simplecache::https://host/x.pt",
        "http:/host/x.pt",
        "http:user:pw@host/x.pt",
    ],
)
def test_urls_that_can_be_read_in_two_ways_are_refused(url: str) -> None:
    assert is_url(url)
    assert redact_url(url) == f"{url.split(':')[0]}://…"
    with pytest.raises(UsageError, match=rf"^{url.split(':')[0]}://…: expected "):
        parse_url(url)


@pytest.mark.parametrize(
    "text",
    ["data:load", "package.module:function", "cifar10:/home/me@org/data", "runs/a:b@c.pt", "C:\\me@x", "C:/a",
     "net.pt", "::error file=a,line=1::x.pt", "git:loader", "epoch:3.pt"],
)  # fmt: skip
def test_paths_and_functions_are_no_urls(text: str) -> None:
    assert not is_url(text)
    remember_urls([text])
    assert without_secrets(f"{text}: not there") == f"{text}: not there"


def test_a_file_with_the_name_of_a_url_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("http:/user:pw@host/x.pt")
    path.parent.mkdir(parents=True)
    path.touch()
    assert not is_url(str(path))


def test_ordinary_words_stay() -> None:
    url = (
        "https://x:abc@host/resnet50.safetensors?response-content-type=application&download=true&inline&n=123"
    )
    remember_url(url)
    said = "x abc resnet50.safetensors application download true inline 123 host"
    assert without_secrets(said) == said
    assert without_secrets(f"at {url}, and") == "at https://host/resnet50.safetensors, and"
    remember_secret("test")
    assert without_secrets("the latest test, testing") == "the latest ***, testing"


def test_secrets_are_forgotten_with_their_command() -> None:
    with remembering():
        remember_secret("s3kr1tword")
        assert without_secrets("s3kr1tword") == "***"
    assert without_secrets("s3kr1tword") == "s3kr1tword"


def test_a_service_may_open_urls_for_ever() -> None:
    for number in range(700):
        remember_url(f"https://host/{number}.pt?signature=Sig-{number:07}-x")
    assert without_secrets("Sig-0000699-x") == "***"


def test_proxies_in_the_environment() -> None:
    result = CliRunner().invoke(
        main, ["inspect", "s3kr1tproxy.pt"], env={"HTTPS_PROXY": "http://me:s3kr1tproxy@proxy:1"}
    )
    assert "s3kr1tproxy" not in result.output


@settings(max_examples=100)
@given(secrets.filter(lambda text: "@" not in text), st.sampled_from(["data: s3", "s3", "path"]))
def test_what_a_checkpoint_says_of_its_data(secret: str, where: str) -> None:
    """Training scripts record the URL of their data, with the keys to it."""
    url = f"s3://KEY:{secret}@bucket/train"
    value: Any = {"s3": url, "path": Path(url), "data: s3": {"args": [{"data": url}]}}[where]
    words = plain_words({"data": value})
    shown = json.dumps([words, presentable(words), str(words)], ensure_ascii=False)
    assert not [part for part in leaked(secret, shown) if part not in "s3://bucket/train"], shown


def test_sentences_with_urls_that_were_never_parsed() -> None:
    told = {
        "see s3://KEY:se/cr et@bucket/x and https://host/x?sig=1": "see s3://bucket/x and https://host/x",
        "s3://bucket: expected a file, found x@y": "s3://bucket: expected a file, found x@y",
        "http://host:8080/x@y is there": "http://host:8080/x@y is there",
        "s3:/KEY:secret@bucket/x": "s3:/bucket/x",
        "a list: s3://b:c@d, s3://e@f, s3://g": "a list: s3://d, s3://f, s3://g",
    }
    for text, shown in told.items():
        assert without_secrets(text) == shown


def test_long_texts_cost_little() -> None:
    """Every pattern takes a time that grows with the text, not with its square."""
    for text in ("a" * 10**6, "a://" * 10**5, "a:/b:" * 10**5, "a.b:" * 10**5 + "://@", "://x?" * 10**5):
        without_secrets(text)


def test_a_traceback_shows_no_secret() -> None:
    url = "closed://user:pa s3kr1tword@bucket/x.pt"
    output = told(["inspect", url], CKPT_FIX_TRACEBACK="1")
    assert "Traceback (most recent call last)" in output
    assert "PermissionError: no access to" in output
    assert "s3kr1tword" not in output
    assert traceback.format_exc() == "NoneType: None\n"
