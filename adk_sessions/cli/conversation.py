"""A conversation as people read one: who, when, what was said, what was called and what changed.

It knows the forms of google-adk's events, and shows what it does not know as short JSON.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from ..session import SessionSummary
from ..survey import StateChange
from .printing import as_text, clean, cut, is_bounded, short, when

# An answer that comes later than so many entries is shown where it comes.
_AHEAD = 200
# Characters of one value of a state, and of a call's arguments and its answer where no width is.
_VALUE, _ARGUMENTS, _ANSWER = 60, 60, 120
_INDENT = "  "

_COLORS = {"user": "bold green", "state": "bold yellow"}
# What of an event has a form of its own here, or says nothing to a reader.
_KNOWN = {
    *("id", "invocation_id", "author", "timestamp", "content", "actions", "error_code"),
    *("error_message", "interrupted", "partial", "turn_complete", "long_running_tool_ids"),
    *("branch", "usage_metadata", "finish_reason", "avg_logprobs", "model_version"),
    *("grounding_metadata", "citation_metadata", "logprobs_result", "node_info"),
    *("isolation_scope", "interaction_id", "cache_metadata"),
    *("input_transcription", "output_transcription"),
}


# What an event's actions are shown as first.
_ORDER = {
    name: place
    for place, name in enumerate(
        ("state_delta", "artifact_delta", "transfer_to_agent", "rewind_before_invocation_id")
    )
}


@dataclass
class Line:
    """A paragraph of an entry; ``style`` is rich's."""

    text: str
    style: str = ""


@dataclass
class Call:
    """A call of a tool; its answer goes with it once it is there."""

    id: str
    name: str
    arguments: Any
    answer: Answer | None = None
    waits: bool = True


@dataclass
class Answer:
    """What a tool has answered."""

    id: str
    name: str
    value: Any


@dataclass
class Entry:
    """What is shown of an event, or of a change of the state."""

    who: str
    time: float
    parts: list[Line | Call | Answer] = field(default_factory=list)
    id: str = ""

    @property
    def waits(self) -> bool:
        """Whether a call of it has no answer yet."""
        return any(isinstance(part, Call) and part.waits for part in self.parts)


# --- what to show ----------------------------------------------------------------------------


def of_event(event: Mapping[str, Any]) -> Entry:
    """The entry of an event.

    Args:
        event: its JSON, a field that was not set left out.
    """
    entry = Entry(str(event.get("author") or "?"), event["timestamp"], id=event["id"])
    entry.parts += _content(event.get("content"))
    if words := [str(event[name]) for name in ("error_code", "error_message") if event.get(name)]:
        entry.parts.append(Line("error: " + " ".join(words), "red"))
    for name in ("input_transcription", "output_transcription"):
        if isinstance(heard := event.get(name), Mapping) and heard.get("text"):
            entry.parts.append(Line(f"(spoken) {heard['text']}", "italic"))
    for flag in ("interrupted", "partial"):
        if event.get(flag):
            entry.parts.append(Line(flag, "yellow"))
    entry.parts += _actions(event.get("actions") or {})
    rest = {
        name: value
        for name, value in event.items()
        if name not in _KNOWN and not _is_nothing(value)
    }
    if rest:
        entry.parts.append(Line(cut(_pairs(rest), 2 * _ANSWER), "dim"))
    return entry


def of_change(change: StateChange) -> Entry:
    """The entry of a change that no event has made."""
    return Entry("state", change.time, [Line(_changed(change.delta, change.deleted), "yellow")])


def of_state(state: Mapping[str, Any], limit: int) -> Iterator[str]:
    """A state, one line a key."""
    for number, (key, value) in enumerate(sorted(state.items())):
        if number == limit:
            yield f"and {len(state) - limit} more"
            return
        yield f"{cut(key, _VALUE)} = {short(value, _ANSWER)}"


def _content(content: Any) -> Iterator[Line | Call | Answer]:
    if _is_nothing(content):
        return
    if isinstance(content, Mapping) and isinstance(content.get("parts"), list):
        content = content["parts"]
    for part in content if isinstance(content, list) else [content]:
        yield from _part(part)


def _part(part: Any) -> Iterator[Line | Call | Answer]:
    if isinstance(part, str):
        yield Line(part)
        return
    if not isinstance(part, Mapping):
        yield Line(short(part, _ANSWER), "dim")
        return
    forms = {_snake(name): value for name, value in part.items() if not _is_nothing(value)}
    thought = forms.pop("thought", False) is True
    forms.pop("thought_signature", None)
    for name, value in forms.items():
        if name == "text" and isinstance(value, str):
            yield Line(f"(thinking) {value}" if thought else value, "dim italic" if thought else "")
        elif name in _FORMS and isinstance(value, Mapping):
            yield _FORMS[name]({_snake(key): inner for key, inner in value.items()})
        elif name != "role":
            yield Line(f"{cut(name, _VALUE)}: {short(value, _ANSWER)}", "dim")


def _call(call: Mapping[str, Any]) -> Call:
    name = str(call.get("name", "?"))
    return Call(str(call.get("id") or name), name, call.get("args", call.get("arguments")))


def _answer(answer: Mapping[str, Any]) -> Answer:
    name = str(answer.get("name", "?"))
    return Answer(str(answer.get("id") or name), name, answer.get("response"))


def _blob(blob: Mapping[str, Any]) -> Line:
    data = blob.get("data")
    size = f", {len(data) * 3 // 4:,} bytes" if isinstance(data, str) else ""
    name = blob.get("display_name") or blob.get("file_uri") or ""
    return Line(f"[{blob.get('mime_type', 'data')}{size}] {name}".rstrip(), "cyan")


_FORMS: dict[str, Any] = {
    "function_call": _call,
    "function_response": _answer,
    "inline_data": _blob,
    "file_data": _blob,
    "executable_code": lambda code: Line(str(code.get("code", "")), "cyan"),
    "code_execution_result": lambda code: Line(f"=> {code.get('output', '')}", "cyan"),
}


def _actions(actions: Mapping[str, Any]) -> Iterator[Line]:
    # in one order, whichever of them the events' class has as fields of its own
    for name, value in sorted(actions.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER))):
        if _is_nothing(value):
            continue
        if name == "state_delta" and isinstance(value, Mapping):
            yield Line("state: " + _changed(value, []), "yellow")
        elif name == "artifact_delta" and isinstance(value, Mapping):
            files = ", ".join(f"{file} version {version}" for file, version in value.items())
            yield Line(f"saved: {files}", "cyan")
        elif name == "transfer_to_agent":
            yield Line(f"goes on: {value}", "cyan")
        elif name == "rewind_before_invocation_id":
            yield Line(f"taken back: everything from invocation {value} on", "yellow")
        elif name != "skip_summarization":
            yield Line(f"{name.replace('_', ' ')}: {short(value, _ANSWER)}", "cyan")


def _changed(delta: Mapping[str, Any], deleted: Iterable[str]) -> str:
    changed = [f"{cut(key, _VALUE)} = {short(value, _VALUE)}" for key, value in delta.items()]
    return ", ".join([*changed, *(f"{cut(key, _VALUE)} deleted" for key in deleted)])


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={as_text(value)}" for name, value in values.items())


def _snake(name: str) -> str:
    """A name as storage spells it: web clients have sent camelCase."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def heading(summary: SessionSummary) -> list[Text]:
    ids = " / ".join(
        clean(text, line=True) or "''" for text in (summary.app_name, summary.user_id, summary.id)
    )
    facts = [f"created {when(summary.create_time)}"]
    facts.append(f"updated {when(summary.last_update_time)}")
    if summary.event_count is not None:
        facts.append(f"{summary.event_count} event{'' if summary.event_count == 1 else 's'}")
    if summary.archive_time is not None:
        facts.append(f"archived {when(summary.archive_time)}")
    if summary.expire_time is not None:
        facts.append(f"expires {when(summary.expire_time)}")
    lines = [Text(ids, "bold")]
    if summary.title:
        lines.append(Text(clean(summary.title, line=True), "bold"))
    lines.append(Text(", ".join(facts), "dim"))
    if summary.labels:
        pairs = " ".join(f"{name}={value}" for name, value in sorted(summary.labels.items()))
        lines.append(Text(clean(pairs, line=True), "dim"))
    return lines


# --- in which order --------------------------------------------------------------------------


async def folded(entries: AsyncIterable[Entry]) -> AsyncIterator[Entry]:
    """Entries with the answers of tools beside their calls; what had nothing else is left out."""
    held: deque[Entry] = deque()
    calls: dict[str, Call] = {}
    async for entry in entries:
        held.append(entry)
        for part in [*entry.parts]:
            if isinstance(part, Call):
                calls[part.id] = part
            elif isinstance(part, Answer) and (call := calls.pop(part.id, None)):
                call.answer, call.waits = part, False
                entry.parts.remove(part)
        while held and (not held[0].waits or len(held) > _AHEAD):
            first = held.popleft()
            for part in first.parts:
                if isinstance(part, Call):
                    calls.pop(part.id, None)
            if first.parts:
                yield first
    for entry in held:
        if entry.parts:
            yield entry


# --- on paper --------------------------------------------------------------------------------


def print_entry(to: Console, entry: Entry, *, ids: bool = False) -> None:
    """An entry: when and who on one line, the rest below."""
    who = cut(entry.who, _VALUE)
    head = Text(when(entry.time), "dim")
    head.append("  ").append(who, _COLORS.get(entry.who, "bold cyan"))
    if ids and entry.id:
        head.append(f"  {clean(entry.id, line=True)}", "dim")
    to.print(head, soft_wrap=True)
    for part in entry.parts:
        if isinstance(part, Line):
            print_text(to, Text(clean(part.text), part.style))
        else:
            to.print(
                Text(_INDENT) + _tool(part, to.width if is_bounded(to) else None), soft_wrap=True
            )


def _tool(part: Call | Answer, width: int | None) -> Text:
    """A call with its answer, or one of them, on one line."""
    text = Text(cut(part.name, _VALUE), "magenta")
    answer: Answer | None = None
    if isinstance(part, Answer):
        answer = part
    else:
        answer, given = part.answer, part.arguments
        inside = _pairs(given) if isinstance(given, Mapping) else as_text(given)
        text = Text.assemble(text, f"({cut(inside, _ARGUMENTS) if given else ''})")
    if answer is None:
        text.append(" …", "dim")
    else:
        value, failed = answer.value, False
        if isinstance(value, Mapping) and len(value) == 1:
            [(name, inner)] = value.items()
            if name in ("result", "output", "error"):
                value, failed = inner, name == "error"
        shown = value if isinstance(value, str) else as_text(value)
        text.append(" → ", "dim")
        text.append("error: " if failed else "", "red")
        # a terminal's line may have room for more than that, and decides
        text.append(cut(shown, width or _ANSWER), "red" if failed else "")
    if width is not None:
        text.truncate(width - len(_INDENT), overflow="ellipsis")
    return text


def print_text(to: Console, text: Text, indent: str = _INDENT) -> None:
    """Text, folded where there is a width."""
    lines: Iterable[Text] = text.split("\n", allow_blank=True)
    if is_bounded(to):
        lines = text.wrap(to, max(to.width - len(indent), 20), tab_size=8)
    for line in lines:
        line.rstrip()
        to.print((Text(indent) + line) if line else Text(), soft_wrap=True)
