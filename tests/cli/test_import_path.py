"""What is imported from the current folder: the modules that the user names and those that they import."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from malicious import Net

import ckpt_tools
from ckpt_tools import import_path
from ckpt_tools.data.data_source import open_source
from ckpt_tools.errors import ArchitectureError, DataError
from ckpt_tools.identify import plugins
from ckpt_tools.import_path import children_without_current_folder, import_user_module, user_code_for_children

ROOT = Path(__file__).parents[2]
# Libraries try to import these and go on without them; none of them is installed everywhere.
OPTIONAL = {
    "colorama",
    "cupy",
    "dill",
    "h5py",
    "opt_einsum",
    "orjson",
    "pandas",
    "tensorflow",
    "triton",
    "xformers",
}
SIZE = ("--input-size", "4")
STARTUP = {"sitecustomize", "usercustomize"}
CANARY = "import pathlib\npathlib.Path(r'{}').touch()\n"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of every name that anybody might import, and plugins for those who ask."""
    folder = tmp_path_factory.mktemp("hostile")
    installed = {path.name.partition(".")[0] for path in Path(torch.__file__).parents[1].iterdir()}
    names = {*sys.stdlib_module_names, *installed, *OPTIONAL, *STARTUP, "plugin"}
    for name in names - {"ckpt_tools", "ckpt_adapters"}:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(CANARY.format(folder / f"canary-{name}"))
    (folder / "plugin-1.dist-info").mkdir()
    (folder / "plugin-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: plugin\nVersion: 1\n"
    )
    groups = ("ckpt_tools.adapters", "torch.backends", "fsspec.specs", "console_scripts")
    declared = "\n".join(f"[{group}]\nplugin = plugin:Plugin" for group in groups)
    (folder / "plugin-1.dist-info" / "entry_points.txt").write_text(declared)
    (folder / "mymodel.py").write_text(
        "import mylayers\ndef make():\n    import mylate\n    return mylayers.Net()\n"
    )
    (folder / "mylayers.py").write_text("from malicious import Net\n")
    (folder / "mylate.py").write_text("")
    torch.save(Net().state_dict(), folder / "model.pt")
    return folder


def started(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    parts = ("", "adapters", "tests/support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in parts)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "options",
    [
        ["-m", "ckpt_tools"],
        ["-mckpt_tools"],
        ["-um", "ckpt_tools"],
        ["-m", "ckpt_tools.__main__"],
        ["-P", "-m", "ckpt_tools"],
    ],
)
def test_python_m_imports_nothing_from_the_current_folder(hostile: Path, options: list[str]) -> None:
    run = started(hostile, sys.executable, *options, "-h")
    assert run.returncode == 0, run.stderr
    assert "ckpt-fix" in run.stdout
    assert not [path.name for path in hostile.glob("canary-*")]


def test_naming_a_module_opens_the_folder_to_nobody_else(hostile: Path) -> None:
    run = started(
        hostile, sys.executable, "-m", "ckpt_tools", "inspect", "model.pt", "--arch", "mymodel:make", *SIZE
    )
    assert run.returncode == 0, run.stderr
    assert "mymodel:make" in run.stdout
    assert not [path.name for path in hostile.glob("canary-*")]


@pytest.mark.parametrize(
    ("argv", "orig_argv", "removed"),
    [
        (["-m", "-h"], ["python", "-m", "ckpt_tools", "-h"], True),
        (["-m"], ["python", "-X", "dev", "-mckpt_tools"], True),
        (["-m", "ckpt_tools"], ["python", "-m", "pytest", "ckpt_tools"], False),
        (["-m"], ["python", "-m", "another_ckpt_tools"], False),
        (["/bin/ckpt-fix"], ["python", "/bin/ckpt-fix"], False),
        (["-c", "-m", "ckpt_tools"], ["python", "-c", "", "-m", "ckpt_tools"], False),
        ([], ["python"], False),
    ],
)
def test_only_python_m_of_this_package_changes_the_path(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], orig_argv: list[str], removed: bool
) -> None:
    here = str(Path.cwd())
    monkeypatch.setattr(sys, "path", [here, "/elsewhere", here])  # the second by PYTHONPATH
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    ckpt_tools._leave_current_folder()
    assert sys.path == [here, "/elsewhere", here][removed:]


def test_a_folder_that_python_did_not_list_is_not_taken_off_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/named/by/PYTHONPATH"])
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ckpt_tools"])
    ckpt_tools._leave_current_folder()
    assert sys.path == ["/named/by/PYTHONPATH"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Writes modules below an empty current folder. What was imported meanwhile is forgotten at the end."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path / "here"))])
    monkeypatch.setattr(import_path._finder, "folders", {})
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = {*sys.modules}

    def write(name: str, source: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return path

    yield write
    for name in {*sys.modules} - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__spec__", "")):
            del sys.modules[name]


def test_a_named_module_finds_its_neighbours_now_and_later(here: Callable[[str, str], Path]) -> None:
    here(
        "here/named.py",
        "import neighbour, package.part, folder.inner\n"
        "def late():\n    import latecomer\n    return latecomer\n",
    )
    here("here/neighbour.py", "import importlib\nfurther = importlib.import_module('further')\n")
    here("here/further.py", "")
    here("here/latecomer.py", "")
    here("here/package/__init__.py", "import further")
    here("here/package/part.py", "from . import sibling")
    here("here/package/sibling.py", "")
    here("here/folder/inner.py", "import further")
    before = [*sys.path]
    module = import_user_module("named")
    assert module.late().__name__ == "latecomer"
    assert import_user_module("named") is module
    assert import_user_module("package.part").sibling
    assert sys.path == before


def test_a_library_finds_nothing_there(here: Callable[[str, str], Path], tmp_path: Path) -> None:
    asked = (
        "try:\n        import optional_thing\n    except ImportError:\n        return None\n    return 1\n"
    )
    here("installed/library.py", f"def ask():\n    {asked}")
    here("here/optional_thing.py", "raise SystemExit('hijacked')")
    here("here/named.py", "import library\nfound = library.ask()\n")
    sys.path.append(str(tmp_path / "installed"))
    module = import_user_module("named")
    assert module.found is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("optional_thing")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("named.part")


def test_what_is_installed_comes_before_a_neighbour_of_the_same_name(
    here: Callable[[str, str], Path], tmp_path: Path
) -> None:
    here("installed/common_name.py", "place = 'installed'")
    here("here/common_name.py", "place = 'here'")
    here("here/named.py", "from common_name import place\nimport json\n")
    sys.path.append(str(tmp_path / "installed"))
    assert import_user_module("named").place == "installed"


@pytest.mark.parametrize("name", ["common_name", "statistics", "torchvision.models", "malicious"])
def test_a_name_that_both_have_is_refused(
    here: Callable[[str, str], Path], tmp_path: Path, name: str
) -> None:
    here("installed/common_name.py", "")
    sys.path.append(str(tmp_path / "installed"))
    path = here(f"here/{name.partition('.')[0]}.py", "raise SystemExit('hijacked')")
    for refused, error in (
        (lambda: plugins.resolve(f"{name}:Net")[0].build(f"{name}:Net", {}), ArchitectureError),
        (lambda: plugins.adapter(f"{name}:Net"), ArchitectureError),
        (lambda: open_source(f"{name}:data"), DataError),
    ):
        with pytest.raises(error, match="found two") as caught:
            refused()
        assert str(path) in str(caught.value)
        assert name in str(caught.value)


def test_on_the_path_the_current_folder_has_the_place_that_the_user_gave_it(
    here: Callable[[str, str], Path], tmp_path: Path
) -> None:
    here("installed/common_name.py", "place = 'installed'")
    here("here/common_name.py", "place = 'here'")
    sys.path[:0] = [str(tmp_path / "here"), str(tmp_path / "installed")]
    assert import_user_module("common_name").place == "here"


def test_our_own_package_is_the_one_that_runs(here: Callable[[str, str], Path]) -> None:
    here("here/ckpt_tools/__init__.py", "raise SystemExit('hijacked')")
    assert import_user_module("ckpt_tools.errors") is sys.modules["ckpt_tools.errors"]


def test_an_adapter_may_stand_in_the_current_folder(here: Callable[[str, str], Path]) -> None:
    here(
        "here/my_adapter.py", "from test_plugins import Foreign\nclass Mine(Foreign):\n    prefix = 'mine'\n"
    )
    plugins.adapter.cache_clear()
    assert plugins.resolve("my_adapter:Mine:anything")[0].prefix == "mine"
    plugins.adapter.cache_clear()


def test_a_spawned_worker_imports_the_users_code_and_nothing_else(here: Callable[[str, str], Path]) -> None:
    here(
        "here/named.py",
        "import neighbour\n"
        "class Data:\n    def read(self):\n        import latecomer\n        return neighbour.A\n",
    )
    here("here/neighbour.py", "class A:\n    pass\ndef function():\n    pass\n")
    here("here/latecomer.py", "")
    here("here/msvcrt.py", "raise SystemExit('hijacked')")  # subprocess tries to import it
    named = import_user_module("named")
    with user_code_for_children(), user_code_for_children():
        sent = bytes(ForkingPickler.dumps([named.Data(), named.neighbour.function, Path, print]))
    assert "reducer_override" not in vars(ForkingPickler)
    script = f"import pickle, subprocess\nprint(pickle.loads({sent!r})[0].read().__name__)"
    run = started(Path.cwd(), sys.executable, "-P", "-c", script)
    assert run.stdout == "A\n", run.stderr


def test_child_processes_leave_the_current_folder_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "", "yes"):
        if before is None:
            monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
        else:
            monkeypatch.setenv("PYTHONSAFEPATH", before)
        with children_without_current_folder():
            assert os.environ["PYTHONSAFEPATH"]
        assert os.environ.get("PYTHONSAFEPATH") == before
