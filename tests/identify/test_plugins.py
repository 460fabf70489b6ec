from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify import plugins


class Foreign:
    """A third party's adapter, as small as one can be."""

    prefix = "foreign"

    def architectures(self):
        return ["only_here"]

    def recognise(self, words):
        return None

    def build(self, name, kwargs):
        raise ArchitectureError(name)

    def class_kwargs(self, shapes, name, kwargs):
        return {}

    def rate_kwargs(self, name):
        return ()

    def input_spec(self, model, name, words):
        return None


class Half:
    prefix = "half"

    def architectures(self):
        return []


@pytest.fixture
def with_plugins(monkeypatch):
    real = plugins.entry_points

    def install(**values):
        added = [EntryPoint(name, value, plugins.GROUP) for name, value in values.items()]
        monkeypatch.setattr(
            plugins,
            "entry_points",
            lambda **wanted: EntryPoints([*real(group=plugins.GROUP), *added]).select(**wanted),
        )

    plugins.adapter.cache_clear()
    yield install
    plugins.adapter.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "prefix", "name"),
    [
        ("timm:resnet50", "timm", "resnet50"),
        ("torchvision:densenet121", "torchvision", "densenet121"),
        ("torchvision.models:resnet18", "factory", "torchvision.models:resnet18"),
        ("factory:torchvision.models:resnet18", "factory", "torchvision.models:resnet18"),
        ("mobilenetv3_small_050", "timm", "mobilenetv3_small_050"),
        ("mobilenet_v3_small", "torchvision", "mobilenet_v3_small"),
        ("test_plugins:Foreign:anything", "foreign", "anything"),
    ],
)
def test_an_architecture_leads_to_its_adapter(architecture, prefix, name):
    adapter, found = plugins.resolve(architecture)
    assert (adapter.prefix, found) == (prefix, name)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("resnet50", "timm:resnet50 or torchvision:resnet50"),
        ("densnet121", "timm:densenet121 or torchvision:densenet121"),
        ("tim:resnet50", "timm:resnet50"),
        ("trochvision:resnet50", "torchvision:resnet50"),
        ("", "timm:NAME"),
    ],
)
def test_a_near_miss_names_what_was_meant(architecture, said):
    with pytest.raises(ArchitectureError, match=said):
        plugins.resolve(architecture)


def test_a_module_of_ones_own_may_have_a_name_like_an_adapters(tmp_path, monkeypatch):
    (tmp_path / "tim.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert plugins.resolve("tim:make")[0].prefix == "factory"


def test_a_third_partys_adapter_is_found(with_plugins):
    with_plugins(foreign="test_plugins:Foreign")
    assert plugins.prefixes()[:2] == ("timm", "torchvision")
    assert plugins.resolve("only_here")[0].prefix == "foreign"
    assert plugins.resolve("foreign:any")[1] == "any"


def test_a_broken_plugin_matters_only_when_it_is_used(with_plugins):
    with_plugins(broken="no_such_package.module:Adapter", half="test_plugins:Half")
    assert {*plugins.adapters()} == {"timm", "torchvision", "factory", "transformers"}
    assert plugins.resolve("timm:resnet50")[0].prefix == "timm"
    with pytest.raises(ArchitectureError, match=r"broken .*no_such_package"):
        plugins.resolve("broken:model")
    with pytest.raises(ArchitectureError, match="lacks recognise, build"):
        plugins.resolve("half:model")


def test_only_the_library_asked_for_is_imported():
    script = """
import sys
from ckpt_tools.identify import plugins
assert plugins.prefixes()
assert "torch" not in sys.modules
plugins.resolve("factory:package.module:make")
assert not {"timm", "torchvision"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-c", script], check=True)
