"""Pickled actions: what google-adk's releases wrote, and what an attacker could have written."""

from __future__ import annotations

import base64
import collections
import contextlib
import copyreg
import datetime
import decimal
import enum
import importlib.util
import json
import math
import os
import pathlib
import pickle
import resource
import sqlite3
import struct
import sys
import time
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest

from adk_sessions.pickles import PickleRefusedError, load_actions

DATA = Path(__file__).parent / "data" / "v0"
EMPTY: dict[str, Any] = {
    "state_delta": {},
    "artifact_delta": {},
    "requested_auth_configs": {},
    "requested_tool_confirmations": {},
}


class Pydantic:
    """Pickles as a pydantic model does."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {
            "__dict__": self._fields,
            "__pydantic_extra__": None,
            "__pydantic_fields_set__": set(self._fields),
            "__pydantic_private__": None,
        }
        return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`model("module", "Name", base)`: a class that pickles by that name, gone after the test."""

    def make(module: str, name: str, base: Any = Pydantic, **body: Any) -> Any:
        holder = sys.modules.get(module) or types.ModuleType(module)
        made = type(name, (base,), {"__module__": module, **body})
        monkeypatch.setitem(sys.modules, module, holder)
        # An import gives the outermost package, which is not there without google-adk.
        package = module.partition(".")[0]
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setattr(holder, name, made, raising=False)
        return made

    return make


@pytest.fixture
def actions(model: Callable[..., Any]) -> Any:
    return model("google.adk.events.event_actions", "EventActions")


# --- what releases wrote ----------------------------------------------------------------------


@pytest.mark.parametrize("release", ["0.1.0", "1.8.0", "1.21.0"])
def test_the_actions_of_a_release_without_that_release(release: str) -> None:
    file = sqlite3.connect(":memory:")
    file.executescript((DATA / f"{release}-sqlite.sql").read_text())
    before = set(sys.modules)
    loaded = {
        row[0]: load_actions(row[1])
        for row in file.execute("SELECT id, actions FROM events WHERE session_id = 's1'")
    }
    file.close()
    assert not {name for name in set(sys.modules) - before if name.startswith("google")}
    assert loaded["e01"] == EMPTY
    assert loaded["e03"]["state_delta"]["plain"]["deep"] == [1, 2.5, True, None, {"ü": "😀"}]
    assert loaded["e03"]["state_delta"]["long"] == 2**70
    assert loaded["e04"]["requested_auth_configs"]["call-2"]["auth_scheme"] == {
        "type_": "apiKey",
        "in_": "header",
        "name": "X-Key",
    }
    assert json.loads(json.dumps(loaded)) == loaded


@pytest.mark.parametrize("protocol", [4, 5])
def test_rich_values_take_the_form_that_google_adk_gives_them(protocol: int, actions: Any) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=2))
    value = {
        "when": datetime.datetime(2026, 1, 2, 3, 4, 5, 678, datetime.UTC),
        "there": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=zone),
        "day": datetime.date(2026, 1, 2),
        "hour": datetime.time(3, 4),
        "span": datetime.timedelta(seconds=90),
        "exact": decimal.Decimal("1.10"),
        "id": uuid.UUID(int=7),
        "set": {1},
        "frozen": frozenset({2}),
        "tuple": (1, (2,)),
        "bytes": b"text",
        "binary": b"\xff\xfe?>",
        "array": bytearray(b"ab"),
        "complex": 1 + 2j,
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, a=[1]),
        "path": pathlib.PurePosixPath("/a/b"),
        "keys": {2: 4, None: 3, datetime.date(2026, 1, 2): 5},
        "same": [shared := ["x"], shared],
    }
    assert load_actions(pickle.dumps(actions(state_delta=value), protocol))["state_delta"] == {
        "when": "2026-01-02T03:04:05.000678Z",
        "there": "2026-01-02T03:04:05+02:00",
        "day": "2026-01-02",
        "hour": "03:04:00",
        "span": "PT1M30S",
        "exact": "1.10",
        "id": "00000000-0000-0000-0000-000000000007",
        "set": [1],
        "frozen": [2],
        "tuple": [1, [2]],
        "bytes": "text",
        "binary": base64.urlsafe_b64encode(b"\xff\xfe?>").decode(),
        "array": "ab",
        "complex": "1+2j",
        "ordered": {"a": 1},
        "default": {"a": [1]},
        "path": "/a/b",
        "keys": {"2": 4, "None": 3, "2026-01-02": 5},
        "same": [["x"], ["x"]],
    }


def test_numbers_and_texts_that_need_the_codec_stay_what_they_are(actions: Any) -> None:
    value = {"nan": math.nan, "inf": -math.inf, "nul": "a\0b", "half": "\ud800", "big": 10**5000}
    loaded = load_actions(pickle.dumps(actions(state_delta=value)))["state_delta"]
    assert math.isnan(loaded.pop("nan"))
    assert loaded == {"inf": -math.inf, "nul": "a\0b", "half": "\ud800", "big": 10**5000}


def test_models_leave_out_none_and_write_bytes_as_they_do(
    actions: Any, model: Callable[..., Any]
) -> None:
    blob = model("google.genai.types", "Blob")
    confirmation = model("google.adk.tools.tool_confirmation", "ToolConfirmation")
    loaded = load_actions(
        pickle.dumps(
            actions(
                escalate=None,
                compaction=blob(data=b"\xff\xfe?>", display_name=None),
                requested_tool_confirmations={"c": confirmation(payload={"a": None}, hint="h")},
            )
        )
    )
    assert loaded == EMPTY | {
        "compaction": {"data": "__4_Pg=="},
        "requested_tool_confirmations": {"c": {"payload": {"a": None}, "hint": "h"}},
    }


def test_enums_by_value_and_by_member(actions: Any, model: Callable[..., Any]) -> None:
    kind = enum.Enum("AuthCredentialTypes", {"API_KEY": "apiKey"}, module="google.adk.auth.x")  # type: ignore[misc]
    made = model("google.adk.auth.auth_credential", "AuthCredentialTypes", object)
    # the reductions of CPython 3.12 and of 3.11.0
    by_value = reducing(made, (kind.API_KEY.value,))
    by_member = reducing(getattr, (made, "API_KEY"))
    loaded = load_actions(pickle.dumps(actions(state_delta={"a": by_value, "b": by_member})))
    assert loaded["state_delta"] == {"a": "apiKey", "b": "apiKey"}


# --- what an attacker wrote -------------------------------------------------------------------


class reducing:
    def __init__(self, *reduction: Any) -> None:
        self._reduction = reduction

    def __reduce__(self) -> Any:
        return self._reduction


FIRED: list[Any] = []


def fire(*args: Any) -> None:
    FIRED.append(args)


@pytest.fixture(autouse=True)
def nothing_is_executed() -> Iterator[None]:
    """What these pickles call says so here; and reading them takes neither time nor memory."""
    began, size = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert FIRED == []
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size < 400_000  # KiB


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def asking_for(module: str, name: str) -> bytes:
    return b"\x80\x04" + short(module) + short(name) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "__import__"),
        ("builtins", "object"),
        ("builtins", "type"),
        ("builtins.__class__", "x"),
        ("subprocess", "Popen"),
        ("datetime", "datetime.__class__"),
        ("datetime", "datetime.__class__.__base__.__subclasses__"),
        ("datetime", "sys.modules"),
        ("google.genai.types", "os.system"),
        ("google.genai.types", "_common.BaseModel"),
        ("google.genai.types", "builtins"),
        ("google.adk.events.event_actions", "EventActions.model_construct"),
        ("google.adk.agents", "LlmAgent"),
        ("google.adk.events.event", "Event"),
        ("adk_sessions.pickles", "_Dict"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("copyreg", "_reconstructor"),
        ("copyreg", "add_extension"),
        ("pickle", "loads"),
        ("", ""),
    ],
)
def test_a_class_that_is_not_on_the_list_is_named(module: str, name: str) -> None:
    by_stack = asking_for(module, name)
    by_line = b"\x80\x04c" + f"{module}\n{name}\n".encode()
    for asked in (by_stack, by_line):
        for rest in (b".", short("touch /tmp/x") + b"\x85R.", b")\x81}b.", b"}b."):
            with pytest.raises(PickleRefusedError) as refused:
                load_actions(asked + rest)
            if module:
                assert refused.value.name == f"{module}.{name}"
            assert refused.value.__cause__ is None


def test_reductions_of_all_kinds_call_nothing(actions: Any) -> None:
    pickle.loads(dump(reducing(fire, ())))
    assert FIRED.pop() == ()  # it would have
    reduction: Any
    for reduction in (
        (fire, ("true",)),
        (eval, ("fire()",)),
        (exec, ("fire()",)),
        (getattr, (os, "system")),
        (map, (fire, ["true"])),
        (collections.defaultdict, (fire,)),
        (type, ("X", (), {})),
    ):
        for payload in (reducing(*reduction), actions(state_delta={"a": reducing(*reduction)})):
            with pytest.raises(PickleRefusedError):
                load_actions(dump(payload))


def dump(value: Any) -> bytes:
    """A module cannot be pickled by itself: it is put there as an import."""

    class Pickler(pickle._Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, types.ModuleType):
                return __import__, (obj.__name__,)
            return NotImplemented

    import io

    Pickler(out := io.BytesIO(), 4).dump(value)
    return out.getvalue()


def test_a_member_is_asked_of_an_enum_alone(actions: Any, model: Callable[..., Any]) -> None:
    made = model("google.genai.types", "Language", object)
    of: Any
    for of in (b"text", [], {}, 1, made, reducing(made, ("x",)), dict):
        payload = actions(state_delta={"a": reducing(getattr, (of, "__class__"))})
        if of is made:  # a name, and no more than that
            assert load_actions(dump(payload))["state_delta"] == {"a": "__class__"}
            continue
        with pytest.raises(PickleRefusedError):
            load_actions(dump(payload))


ACTIONS = asking_for("google.adk.events.event_actions", "EventActions")


@pytest.mark.parametrize(
    "data",
    {
        "nothing": b"",
        "text": b"no pickle at all",
        "no stop": b"\x80\x04}",
        "only a dict": b"\x80\x04}.",
        "a class itself": ACTIONS + b".",
        "no state": ACTIONS + b")\x81.",
        "INST": b"(S'true'\nios\nsystem\n.",
        "OBJ": b"\x80\x04(" + asking_for("os", "system")[2:] + b"o.",
        "OBJ of an allowed one": b"\x80\x04(" + ACTIONS[2:] + b"o.",
        "persistent id": b"Pevil\n.",
        "binary persistent id": b"\x80\x04K\x01Q.",
        "extension 1": b"\x80\x04\x82\x01.",
        "extension 2": b"\x80\x04\x83\x01\x00.",
        "extension 4": b"\x80\x04\x84\x01\x00\x00\x00.",
        "buffer": b"\x80\x05\x97.",
        "read only buffer": b"\x80\x05K\x01\x98.",
        "protocol 0": pickle.dumps({"a": 1}, 0),
        "protocol 99": b"\x80\x63}.",
        "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a.",
        "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
        "long bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"a.",
        "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
        "long integer": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"a.",
        "negative length": b"\x80\x04\x8b" + struct.pack("<i", -1) + b"a.",
        "big memo": b"\x80\x04}r\xff\xff\xff\x7f.",
        "memo by text": b"\x80\x04}p2000000000\n.",
        "unknown memo": b"\x80\x04j\xff\xff\xff\x7f.",
        "empty stack": b"\x80\x04\x85R.",
        "deep": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "deep state": ACTIONS + b")\x81}" + short("__dict__") + b"}" + short("state_delta") + b"}"
        + (short("a") + b"}") * 50_000 + b"s" * 50_002 + b"b.",
        "BUILD of a class": ACTIONS + b"}" + short("__setstate__") + b"K\x01sb.",
        "BUILD of a dict's class": asking_for("collections", "OrderedDict")
        + b"N}" + short("__init__") + b"K\x01s\x86b.",
        "BUILD of a dict": asking_for("collections", "OrderedDict") + b")R}b.",
        "BUILD of a list": b"\x80\x04]}" + short("append") + b"K\x01sb.",
        "a state that is no dict": ACTIONS + b")\x81K\x01b.",
        "slots": ACTIONS + b")\x81N}" + short("module") + short("os") + b"s\x86b.",
        "__dict__ that is no dict": ACTIONS + b")\x81}" + short("__dict__") + b"K\x01sb.",
        "an unknown field": ACTIONS + b")\x81}" + short("__dict__") + b"}" + short("evil")
        + b"K\x01ssb.",
        "a field of another type": ACTIONS + b")\x81}" + short("__dict__") + b"}"
        + short("state_delta") + b"K\x01ssb.",
        "appended to": ACTIONS + b")\x81K\x01a.",
        "item set": ACTIONS + b")\x81K\x01K\x01s.",
        "keywords": ACTIONS + b")}" + short("cls") + b"K\x01s\x92.",
    }.items(),
    ids=lambda item: item[0],
)  # fmt: skip
def test_damaged_and_hostile_bytes_are_refused(data: tuple[str, bytes]) -> None:
    with pytest.raises(PickleRefusedError) as refused:
        load_actions(data[1])
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None
    assert len(str(refused.value)) < 200
    # no stand-in was harmed
    assert load_actions(ACTIONS + b")\x81}" + short("__dict__") + b"}sb.") == EMPTY


def test_every_cut_and_every_flip_is_refused_or_read(actions: Any) -> None:
    data = pickle.dumps(actions(state_delta={"a": [1, datetime.datetime(2026, 1, 1)], "b": b"x"}))
    for at in range(len(data)):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :]):
            with contextlib.suppress(PickleRefusedError):
                assert load_actions(changed).keys() >= EMPTY.keys()


def test_what_contains_itself_is_refused(actions: Any) -> None:
    loop: dict[str, Any] = {}
    loop["a"] = [loop]
    with pytest.raises(PickleRefusedError, match="contains itself"):
        load_actions(pickle.dumps(actions(state_delta=loop)))


def test_sharing_cannot_blow_it_up(actions: Any) -> None:
    bomb: Any = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(PickleRefusedError, match="too large"):
        load_actions(pickle.dumps(actions(state_delta={"a": bomb})))
    text = "x" * 100_000
    with pytest.raises(PickleRefusedError, match="too large"):
        load_actions(pickle.dumps(actions(state_delta={"a": [text] * 1000})))
    many = load_actions(pickle.dumps(actions(state_delta={"a": [text] * 30})))
    assert len(many["state_delta"]["a"]) == 30


def test_values_of_the_library_are_made_of_plain_arguments_only() -> None:
    for module, name, arguments in (
        ("datetime", "datetime", b"K\x01\x85"),
        ("datetime", "datetime", b"C\x0a" + b"\xff" * 10 + b"\x85"),
        ("datetime", "timezone", b"K\x01\x85"),
        ("datetime", "timedelta", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"),
        ("decimal", "Decimal", short("no number") + b"\x85"),
        ("builtins", "int", short("1") + b"\x85"),
        ("builtins", "bytes", b"\x8a\x05" + b"\xff" * 4 + b"\x00\x85"),
        ("builtins", "bytearray", b"J\xff\xff\xff\x7f\x85"),
        ("uuid", "UUID", b")"),
        ("pathlib", "PosixPath", b"K\x01\x85"),
    ):
        value = asking_for(module, name)[2:] + arguments + b"R"
        data = ACTIONS + b")\x81}" + short("__dict__") + b"}" + short("state_delta") + b"}"
        with pytest.raises(PickleRefusedError):
            load_actions(data + short("a") + value + b"sssb.")


def test_a_name_cannot_carry_a_payload() -> None:
    with pytest.raises(PickleRefusedError) as refused:
        load_actions(asking_for("x\x1b[2J\n" + "y" * 200, "z") + b".")
    assert len(refused.value.name) == 120
    assert refused.value.name.isprintable()


# What costs much more than it takes to write: a child process reads it, since what goes wrong is
# a hang, or the stack's end. Each is the value of a key of state_delta, or the whole of it.


def with_delta(value: bytes) -> bytes:
    event_actions = asking_for("google.adk.events.event_actions", "EventActions")
    model = event_actions[: event_actions.index(b"\x93") + 1] + b")\x81"
    return model + b"}(" + short("__dict__") + b"}(" + short("state_delta") + value + b"uub."


def under_a_key(value: bytes) -> bytes:
    return with_delta(b"}" + short("a") + value + b"s")


def long_integer(size: int) -> bytes:
    return b"\x8b" + struct.pack("<i", size) + b"\x7f" * size


def colliding(count: int) -> bytes:
    """Integers that all have the hash 0."""
    numbers = (pickle.encode_long(n * (2**61 - 1)) for n in range(1, count))
    return b"".join(b"\x8a" + bytes([len(number)]) + number for number in numbers)


COSTLY: dict[str, Callable[[], bytes]] = {
    "a key whose hash takes 2**60 steps": lambda: with_delta(b"})" + b"2\x86" * 60 + b"Ns"),
    "a key of a million tuples": lambda: with_delta(b"})" + b"\x85" * 1_000_000 + b"Ns"),
    "a member of a million tuples": lambda: under_a_key(b"\x8f()" + b"\x85" * 1_000_000 + b"\x90"),
    "a set that collides": lambda: under_a_key(b"\x8f(" + colliding(60_000) + b"\x90"),
    "a long number": lambda: under_a_key(long_integer(1_000_000)),
    "a long number, many times": lambda: under_a_key(
        b"(" + long_integer(100_000) + b"2" * 20_000 + b"l"
    ),
    "a long number as a key": lambda: with_delta(b"}" + long_integer(1_000_000) + b"Ns"),
    "millions of sets": lambda: with_delta(b"(" + b"\x8f" * 8_000_000 + b"1}"),
    "many classes": lambda: with_delta(
        b"("
        + short("google.genai.types")
        + b"\x94"
        + b"".join(b"h\x00" + short(f"A{n:05}") + b"\x93" for n in range(100_000))
        + b"1}"
    ),
}
READ = """
import resource, sys
from adk_sessions.pickles import PickleRefusedError, load_actions
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (8, 8))
try:
    load_actions(sys.stdin.buffer.read())
except PickleRefusedError as error:
    print("refused", error.name)
else:
    print("read")
"""


@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_too_much_is_refused_or_read_in_time(name: str) -> None:
    done = forked.run("-c", READ, input=COSTLY[name](), patience=60)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("read" if name == "a set that collides" else "refused")
