"""A value that this process cannot decode harms nobody but whoever asks for it, and can be deleted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import enum
import sys
import types

import pytest

from strictflow_mp import SerializationError, StrictFlow, read, write

MODULE = "a_module_that_is_here_for_a_while"


@pytest.fixture
def strange(monkeypatch):
    """A member of an Enum whose module nobody can import when `forget` has been called."""
    module = types.ModuleType(MODULE)
    module.Mode = enum.Enum("Mode", {"FAST": 1}, module=MODULE, qualname="Mode")
    sys.modules[MODULE] = module
    yield module.Mode.FAST
    sys.modules.pop(MODULE, None)


def forget():
    del sys.modules[MODULE]


def found(changes):
    """The key and value of the next change, or the key of the next fault."""
    try:
        change = next(changes)
    except SerializationError as error:
        return error.key
    return change.key, change.value


@pytest.mark.parametrize("keys", [("a", "mode", "b"), ()], ids=["some", "all"])
def test_a_watch_raises_it_once_and_goes_on(strange, keys):
    with StrictFlow(state={"a": 0, "b": 0, "mode": 0}) as flow, flow.watch(*keys) as changes:
        flow.update({"a": 1, "mode": strange, "b": 1}).result(30)
        forget()
        got = [found(changes) for _ in range(3)]
        assert sorted(got, key=str) == [("a", 1), ("b", 1), "mode"]
        flow.put("b", 2).result(30)
        assert found(changes) == ("b", 2)
        flow.put("mode", 5).result(30)
        assert found(changes) == ("mode", 5)


def test_an_async_watch_raises_it_once_and_goes_on(strange):
    async def look(changes):
        got = []
        while len(got) < 3:
            try:
                async for change in changes:
                    got.append(change.key)
                    if len(got) == 3:
                        break
            except SerializationError as error:
                got.append((error.key,))
        return got

    with StrictFlow(state={"a": 0, "b": 0, "mode": 0}) as flow, flow.watch() as changes:
        flow.update({"a": 1, "mode": strange, "b": 1}).result(30)
        forget()
        assert sorted(asyncio.run(look(changes)), key=str) == [("mode",), "a", "b"]


def test_a_watch_of_which_a_signal_handler_makes_a_mess_loses_nothing(strange, monkeypatch):
    from strictflow_mp.flow import watch

    class Interrupted(Exception):
        pass

    def interrupt(*args):
        monkeypatch.undo()
        raise Interrupted

    for keys in [("a", "b"), ()]:
        with StrictFlow(state={"a": 0, "b": 0}) as flow, flow.watch(*keys) as changes:
            flow.put("a", 1).result(30)
            flow.put("b", 1).result(30)
            first = True

            def decode(reader, version, cell, kept=watch.decode):
                nonlocal first
                if first:
                    first = False
                    return kept(reader, version, cell)
                return interrupt()

            monkeypatch.setattr(watch, "decode", decode)
            with pytest.raises(Interrupted):
                next(changes)
            assert sorted([found(changes), found(changes)]) == [("a", 1), ("b", 1)]


def test_reads_name_the_key_and_the_rest_is_read(strange):
    with StrictFlow(state={"a": 1, "mode": strange}) as flow:
        forget()
        reads = [
            lambda: flow.state["mode"],
            lambda: flow.peek("mode"),
            lambda: flow.snapshot()["mode"],
            lambda: dict(flow.state),
            lambda: flow.state.get("mode"),
            lambda: read(flow, where="worker")(lambda: flow.state["mode"])().result(30),
            lambda: read(flow)(lambda: flow.state["mode"])().result(30),
            lambda: flow.state.pop("mode", None),
            lambda: flow.state.setdefault("mode", 2),
        ]
        for look in [*reads, *reads]:
            with pytest.raises(SerializationError, match="'mode'") as caught:
                look()
            assert caught.value.key == "mode"
            assert caught.value.flow == flow.name
        assert "mode" in flow.state
        assert "mode" in flow.snapshot()
        assert sorted(flow.state) == ["a", "mode"]
        assert flow.state["a"] == 1


def test_a_value_that_changes_into_one_is_told_of_by_key(strange):
    with StrictFlow(state={"mode": strange, "other": 0}) as flow:
        payload = flow.state["mode"]
        assert payload is strange
        flow.put("mode", strange).result(30)
        flow.put("other", 1).result(30)
        forget()
        with pytest.raises(SerializationError, match="key 'mode'"):
            flow.state["mode"]


@pytest.mark.parametrize("kind", ["write", "read", "async read"])
def test_a_result_harms_its_own_future_alone(kind):
    with StrictFlow(state={"n": 0}) as flow:

        def answer():
            module = types.ModuleType(MODULE)  # the coordinator has it, and nobody else
            module.Mode = enum.Enum("Mode", {"FAST": 1}, module=MODULE, qualname="Mode")
            sys.modules[MODULE] = module
            return {"mode": [module.Mode.FAST]}

        async def answer_later():
            return answer()

        ask = read(flow)(answer_later) if kind == "async read" else {"write": write, "read": read}[kind](flow)(answer)
        bump = write(flow, key="n")(lambda n: n + 1)
        attachment = flow._client.attach()
        stream = attachment.stream

        def fails(look):
            with pytest.raises(SerializationError, match=rf"{MODULE}\.Mode\.FAST is not found in this process"):
                look()

        before, strange, after = bump(), ask(), bump()
        assert (before.result(30), after.result(30)) == (1, 2)
        for _ in range(2):
            fails(lambda: strange.result(30))
        assert type(strange.exception(30)) is SerializationError
        # Those that a thread in the background reads, too.
        futures = [bump(), ask(), bump()]
        assert concurrent.futures.wait(futures, timeout=30).not_done == set()
        fails(futures[1].result)
        assert [futures[0].result(), futures[2].result()] == [3, 4]

        async def await_it():
            return await ask()

        fails(lambda: asyncio.run(await_it()))
        assert bump().result(30) == flow.state["n"] == 5
        assert (attachment.stream is stream, flow.stats().restarts) == (True, 0)


@pytest.mark.parametrize("way", ["del", "delete", "clear", "put", "p1 del", "p1 clear", "p1 put"])
def test_it_can_be_deleted_and_replaced(strange, way):
    with StrictFlow(state={"a": 1, "mode": strange}) as flow:
        forget()

        @write(flow)
        def inside(how):
            assert "mode" in flow.state
            if how == "del":
                del flow.state["mode"]
                assert "mode" not in flow.state
            elif how == "clear":
                flow.state.clear()
            else:
                flow.state["mode"] = 2

        if way == "del":
            del flow.state["mode"]
        elif way == "delete":
            flow.delete("mode").result(30)
        elif way == "clear":
            flow.state.clear()
        elif way == "put":
            flow.state["mode"] = 2
        else:
            inside(way.split()[1]).result(30)
        left = {"a": 1} if "del" in way else {} if "clear" in way else {"a": 1, "mode": 2}
        assert dict(flow.state) == left


@pytest.mark.parametrize("fault", ["OSError('no disk')", "SyntaxError(b'odd')", "LookupError()", "SystemExit(2)"])
def test_a_module_may_raise_anything(strange, fault, tmp_path, monkeypatch):
    with StrictFlow(state={"mode": strange}) as flow:
        forget()
        (tmp_path / f"{MODULE}.py").write_text(f"raise {fault}\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(SerializationError, match="'mode'"):
            flow.state["mode"]


@pytest.mark.parametrize(
    "line", ["raise SystemExit(2)", "raise KeyboardInterrupt", "import os; os._exit(9)", "raise OSError('no disk')"]
)
def test_what_is_put_is_imported_by_nobody_but_who_asks_for_it(strange, line, tmp_path, monkeypatch):
    """Whatever its module does in the coordinator: a put is no reason to find out."""
    (tmp_path / f"{MODULE}.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with StrictFlow(state={"n": 1}) as flow:
        beside = flow.put("n", 2)
        flow.put("mode", strange).result(30)
        flow.update({"all": [{"deep": (strange,)}, {strange}], "m": 1}).result(30)
        flow.state.setdefault("late", strange)
        assert beside.result(30) is None
        assert flow.state["mode"] is strange
        assert flow.state["all"][0]["deep"] == (strange,)
        assert flow.state.pop("late") is strange
        assert flow.state["n"] == 2
        assert flow.stats().restarts == 0
