"""A moderated stream: what is shown was judged, in order, whatever the chunks; and the drill over real HTTP."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import fields
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.safety.breaker import Breaker
from alpaca_ray.safety.local_moderation import LocalModerator
from alpaca_ray.safety.moderation import Backend, Chain
from alpaca_ray.safety.verdict import ModerationUnavailableError, Verdict
from alpaca_ray.serve.engine import EngineError, Health, SamplingParams
from alpaca_ray.serve.hold import Hold
from alpaca_ray.serve.moderated import ContentFilterError, Kind, ModeratedModel, Patience
from alpaca_ray.serve.sentences import next_end
from alpaca_ray.serve.text import Message, PromptEcho, TextDelta, TextLogprob, TextRequest, TokenPrompt
from tests.moderation_server import KEY, Fault, ModerationServer, moderation_server
from tests.moderators import Endpoint

# Ends of all kinds, words, spaces, closing marks, and a bad word.
TEXTS = st.lists(
    st.sampled_from(
        ["word", " ", "a", ". ", ".", "! ", "\n", "\u3002", "\u300d", "\u65e5\u672c", "\u2026", '" ', "BAD", "3.14"]
    ),
    max_size=60,
).map("".join)
CUTS = st.lists(st.integers(0, 250), max_size=30)
Recorded = list[tuple[Verdict | None, Kind, float]]


def chunks(text: str, cuts: Sequence[int]) -> list[str]:
    """The text cut at the given places; a place given twice makes an empty piece."""
    places = sorted([0, *(min(cut, len(text)) for cut in cuts), len(text)])
    return [text[start:end] for start, end in pairwise(places)]


def deltas_of(pieces: Sequence[str]) -> list[TextDelta]:
    """One token for each piece, its number its id, then the end."""
    return [
        *(TextDelta(piece, 3, 1, None, (i,), (TextLogprob(b"%d" % i, -1.0),)) for i, piece in enumerate(pieces)),
        TextDelta("", 3, 0, "stop"),
    ]


class Model:
    """A TextModel that gives the deltas; an exception among them is raised, an Event is awaited."""

    def __init__(self, *deltas: TextDelta | Exception | asyncio.Event) -> None:
        self.deltas = deltas
        self.requests: list[TextRequest] = []
        self.num_given = 0
        self.closed = asyncio.Event()

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        self.requests.append(request)
        if request.echo and isinstance(request.prompt, TokenPrompt):
            yield TextDelta("", 3, 0, "length", prompt=PromptEcho("".join(map(chr, request.prompt.token_ids))))
            return
        try:
            for delta in self.deltas:
                if isinstance(delta, Exception):
                    raise delta
                if isinstance(delta, asyncio.Event):
                    await delta.wait()
                else:
                    self.num_given += 1
                    yield delta
        finally:
            self.closed.set()

    async def health(self) -> Health:
        return Health(0, 0)


class Words:
    """A Moderator that flags a text with a bad word in it, and notes all that it was shown."""

    def __init__(self, bad: str = "BAD") -> None:
        self.bad = bad
        self.seen: list[str] = []

    async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
        self.seen += texts
        return [Verdict(self.bad in text, ("hate",) if self.bad in text else (), "words", False) for text in texts]


class Steps(Words):
    """Words that judge only when they are let: `asked` is set by each call, which then waits for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = asyncio.Event(), asyncio.Semaphore(0)

    async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
        self.asked.set()
        await self.go.acquire()
        return await super().moderate(texts)


class Failing:
    """A Moderator that answers `num_good` times, then never again."""

    def __init__(self, num_good: int) -> None:
        self.num_good = num_good

    async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
        self.num_good -= 1
        if self.num_good < 0:
            raise ModerationUnavailableError("down")
        return [Verdict(False, (), "words", False) for _ in texts]


def request(prompt: str | tuple[Message, ...] | TokenPrompt = "Say:") -> TextRequest:
    return TextRequest(prompt, SamplingParams())


async def collected(model: ModeratedModel, asked: TextRequest | None = None) -> list[TextDelta]:
    async with aclosing(model.complete(asked or request())) as deltas:
        return [delta async for delta in deltas]


def shown(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def ends_of(text: str, max_chars: int = 30) -> list[int]:
    ends, start = [], 0
    while (end := next_end(text, start, 4, max_chars)) is not None:
        ends.append(end)
        start = end
    return ends


# --- sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It costs 3.14 dollars. That is cheap! Is it? ", ["It costs 3.14 dollars. ", "That is cheap! ", "Is it? "]),
        ('He said "no." Then he left.', ['He said "no." ']),
        ("- one item\n- two items\n\nEnd", ["- one item\n", "- two items\n"]),
        ("for x in y:\n    print(x)\n}\n", ["for x in y:\n", "    print(x)\n"]),
        ("\u4eca\u65e5\u306f\u6674\u308c\u3067\u3059\u3002\u300c\u306f\u3044\u305d\u3046\u3060\u3002\u300d\u3068", [
            "\u4eca\u65e5\u306f\u6674\u308c\u3067\u3059\u3002", "\u300c\u306f\u3044\u305d\u3046\u3060\u3002\u300d"]),
        ("1. Take the egg. 2. Eat", ["1. Take the egg. "]),
        ("no full stop in these words at all", ["no full stop in these words "]),
        ("x" * 65, ["x" * 30, "x" * 30]),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_would_say(text: str, sentences: list[str]) -> None:
    ends = ends_of(text)
    assert [text[start:end] for start, end in pairwise([0, *ends])] == sentences


@settings(deadline=None)
@given(text=TEXTS, cut=st.integers(0, 200))
def test_an_end_depends_on_the_text_alone_and_comes_in_time(text: str, cut: int) -> None:
    ends = ends_of(text)
    sooner = ends_of(text[:cut])
    assert ends[: len(sooner)] == sooner
    assert all(0 < end - start <= 30 for start, end in pairwise([0, *ends]))
    assert len(text) - ([0, *ends])[-1] <= 30


# --- what is held


@settings(deadline=None)
@given(text=TEXTS, cuts=CUTS, stops=st.data())
def test_what_is_released_says_nothing_of_what_is_held(text: str, cuts: list[int], stops: st.DataObject) -> None:
    pieces = chunks(text, cuts)
    hold, released = Hold(4, 30), []
    for delta in deltas_of(pieces):
        hold.push(delta)
        if hold.ends:
            end = hold.ends[-1] if hold.is_finished else stops.draw(st.sampled_from([hold.shown, *hold.ends]))
            if given_back := hold.release(end):
                released.append(given_back)
            assert hold.text_until(end) == shown(released)
            ids = [i for delta in released for i in delta.token_ids]
            assert "".join(pieces[i] for i in ids) == shown(released)[: sum(len(pieces[i]) for i in ids)]
            assert not ids or hold.is_finished or pieces[ids[-1]] != ""
    assert hold.is_over
    whole = deltas_of(pieces)
    assert shown(released) == text
    assert sum(delta.num_tokens for delta in released) == len(pieces)
    assert [i for delta in released for i in delta.token_ids] == list(range(len(pieces)))
    assert [p for delta in released for p in delta.logprobs] == [p for delta in whole for p in delta.logprobs]
    assert [delta.finish_reason for delta in released if delta.finish_reason] == ["stop"]
    assert released[-1].finish_reason == "stop"


def test_every_field_of_a_delta_is_carried() -> None:
    full = TextDelta("text", 3, 2, "stop", (1, 2), (TextLogprob(b"t", -1.0),), PromptEcho("p"))
    assert all(getattr(full, field.name) for field in fields(full))
    hold = Hold()
    hold.push(full)
    assert hold.release(4) == full


# --- what is shown


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, cuts=CUTS)
def test_a_good_text_comes_whole_and_a_bad_one_ends_before_its_first_bad_sentence(text: str, cuts: list[int]) -> None:
    words, recorded = Words(), Recorded()
    model = ModeratedModel(
        Model(*deltas_of(chunks(text, cuts))), words, lambda *r: recorded.append(r), Patience(4, 30), lambda: 7.0
    )
    deltas = asyncio.run(collected(model))

    if "BAD" not in text:
        assert shown(deltas) == text
        assert deltas[-1].finish_reason == "stop"
    else:
        # The longest hold may cut a bad word in two: then its sentence is the one that completes it.
        clean = [end for end in [0, *ends_of(text)] if "BAD" not in text[:end]]
        assert shown(deltas) == text[: clean[-1]]
        assert deltas[-1] == TextDelta("", 3, 0, "content_filter")
    assert all(verdict is not None and latency_s == 0.0 for verdict, _, latency_s in recorded)
    assert [kind for _, kind, _ in recorded][:1] == ["input"]


def test_the_model_goes_on_while_a_sentence_is_judged_and_only_one_judgement_is_out() -> None:
    async def run() -> None:
        words, rest = Steps(), asyncio.Event()
        texts = ["First sentence. ", "Second one. ", "Third one. ", "BAD fourth one. ", "Fifth one. "]
        model = Model(*(TextDelta(text, 3, 1) for text in texts[:1]), rest, *deltas_of(texts[1:]))
        stream = ModeratedModel(model, words, patience=Patience(4)).complete(request())
        first = asyncio.create_task(anext(stream))
        words.go.release()  # the prompt
        await words.asked.wait()
        words.asked.clear()
        await words.asked.wait()
        rest.set()
        await model.closed.wait()  # the model is done, and nothing is shown
        assert not first.done()
        words.go.release()
        assert (await first).text == texts[0]
        for _ in range(20):
            words.go.release()
        assert [(d.text, d.finish_reason) async for d in stream] == [
            (texts[1] + texts[2], None),
            ("", "content_filter"),
        ]
        assert words.seen[:3] == ["Say:", texts[0], "".join(texts)], "all that is new goes into one judgement"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_flagged_sentence_closes_the_model_at_once() -> None:
    async def run() -> None:
        never = asyncio.Event()
        model = Model(TextDelta("A good sentence. ", 3, 1), TextDelta("Then a BAD sentence. ", 3, 1), never)
        num_tasks = len(asyncio.all_tasks())
        stream = ModeratedModel(model, Words()).complete(request())
        seen = []
        async for delta in stream:
            seen.append(delta)
            if delta.finish_reason:
                assert model.closed.is_set()
        assert shown(seen) == "A good sentence. "
        assert len(asyncio.all_tasks()) == num_tasks

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_client_that_leaves_closes_the_model() -> None:
    async def run() -> None:
        model = Model(TextDelta("A good sentence. ", 3, 1), asyncio.Event())
        num_tasks = len(asyncio.all_tasks())
        stream = ModeratedModel(model, Words()).complete(request())
        assert (await anext(stream)).text == "A good sentence. "
        await stream.aclose()
        assert model.closed.is_set()
        assert len(asyncio.all_tasks()) == num_tasks

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize(
    "prompt",
    [
        "something BAD",
        (Message("system", "Be good."), Message("user", "something BAD"), Message("user", "hello")),
        TokenPrompt(tuple(map(ord, "something BAD"))),
    ],
)
def test_a_flagged_prompt_never_reaches_the_model(prompt: str | tuple[Message, ...] | TokenPrompt) -> None:
    model, recorded = Model(*deltas_of(["Sure."])), Recorded()
    with pytest.raises(ContentFilterError, match="hate") as caught:
        asyncio.run(collected(ModeratedModel(model, Words(), lambda *r: recorded.append(r)), request(prompt)))
    assert caught.value.categories == ("hate",)
    assert model.num_given == 0
    assert [(kind, verdict is not None and verdict.flagged) for verdict, kind, _ in recorded] == [("input", True)]


def test_a_prompt_that_is_bad_only_as_a_whole_is_flagged() -> None:
    messages = (Message("user", "very"), Message("user", "bad things"))
    with pytest.raises(ContentFilterError):
        asyncio.run(collected(ModeratedModel(Model(), Words("very\nbad")), request(messages)))


def test_an_error_of_the_model_is_passed_on() -> None:
    async def run(*deltas: TextDelta | Exception) -> tuple[str, str]:
        seen, stream = [], ModeratedModel(Model(*deltas), Words()).complete(request())
        try:
            async for delta in stream:
                seen.append(delta.text)
        except EngineError as error:
            return "".join(seen), str(error)
        return "".join(seen), "no error"

    held = TextDelta("Held", 3, 1)
    assert asyncio.run(run(held, EngineError("it died"))) == ("", "it died")
    assert asyncio.run(run(held)) == ("", "a completion ended without a finish reason")


def test_without_a_verdict_the_first_sentence_is_an_error_and_a_later_one_an_end() -> None:
    sentences = ["The first sentence. ", "The second sentence. "]
    for num_good, text in [(0, None), (1, None), (2, sentences[0])]:
        recorded = Recorded()

        async def run(num_good: int = num_good, recorded: Recorded = recorded) -> list[TextDelta]:
            second = asyncio.Event()
            model = Model(TextDelta(sentences[0], 3, 1), second, *deltas_of(sentences[1:]))
            moderated = ModeratedModel(model, Failing(num_good), lambda *r: recorded.append(r))
            seen = []
            async for delta in moderated.complete(request()):
                seen.append(delta)
                second.set()
            return seen

        if text is None:
            with pytest.raises(ModerationUnavailableError):
                asyncio.run(run())
        else:
            assert [(d.text, d.finish_reason) for d in asyncio.run(run())] == [(text, None), ("", "content_filter")]
        assert recorded[-1][0] is None


def test_a_moderator_that_hangs_hangs_no_stream() -> None:
    class Hung(Failing):
        async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
            try:
                return await super().moderate(texts)
            except ModerationUnavailableError:
                await asyncio.Event().wait()
                raise

    model = ModeratedModel(Model(*deltas_of(["Text."])), Hung(1), patience=Patience(timeout_s=0.05))
    with pytest.raises(ModerationUnavailableError, match="timeout"):
        asyncio.run(asyncio.wait_for(collected(model), 30))


def test_no_verdicts_are_not_a_good_verdict() -> None:
    class Empty(Words):
        async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
            return []

    with pytest.raises(ModerationUnavailableError, match="bad_response"):
        asyncio.run(collected(ModeratedModel(Model(*deltas_of(["Text."])), Empty())))


# --- the drill, over real HTTP

STORY = ["It was a calm day. ", "The sun shone on it. ", "Then all ended BADLY here. ", "Nobody knew. "]


PATIENT = Patience(timeout_s=60.0)


class Drill:
    """A moderated model behind the endpoint alone, or with the local patterns behind it."""

    def __init__(self, server: ModerationServer, key: str = KEY, with_local: bool = False) -> None:
        self.now_s = 0.0
        self.recorded = Recorded()
        self.openai = Endpoint(server, key)
        stages = [Backend("openai", self.openai, Breaker(2, 10.0), timeout_s=60.0)]
        self.chain = Chain([*stages, Backend("local", LocalModerator())] if with_local else stages, clock=self.clock)

    def clock(self) -> float:
        return self.now_s

    async def ask(self, story: Sequence[str] = STORY) -> tuple[str, str]:
        """What left, and how it ended."""
        moderated = ModeratedModel(Model(*deltas_of(story)), self.chain, lambda *r: self.recorded.append(r), PATIENT)
        text = ""
        try:
            async for delta in moderated.complete(request()):
                text += delta.text
                if delta.finish_reason:
                    return text, delta.finish_reason
        except ModerationUnavailableError:
            return text, "unavailable"
        raise AssertionError("no end")

    @property
    def num_calls(self) -> int:
        breaker = self.chain.stats()["openai"].breaker
        return breaker.num_failed + breaker.num_succeeded

    @property
    def state(self) -> str:
        return self.chain.stats()["openai"].breaker.state


def test_a_stream_that_turns_bad_midway_is_cut_before_the_bad_sentence() -> None:
    async def run(server: ModerationServer) -> None:
        drill = Drill(server)
        assert await drill.ask() == ("".join(STORY[:2]), "content_filter")
        assert await drill.ask(STORY[:2]) == ("".join(STORY[:2]), "stop")
        flagged = [verdict for verdict, _, _ in drill.recorded if verdict is not None and verdict.flagged]
        assert flagged == [Verdict(True, ("violence",), "openai", degraded=False)]
        await drill.openai.close()

    with moderation_server() as server:
        asyncio.run(asyncio.wait_for(run(server), 120))


@pytest.mark.parametrize("fault", ["slow", "reset", "torn", "short", 401, 429, 500])
def test_no_unmoderated_character_leaves_and_the_breaker_opens_and_closes(fault: Fault) -> None:
    async def run(server: ModerationServer) -> None:
        drill = Drill(server)
        server.fault = fault
        assert [await drill.ask() for _ in range(3)] == [("", "unavailable")] * 3
        assert (drill.state, drill.num_calls) == ("open", 2)
        assert [verdict for verdict, _, _ in drill.recorded] == [None] * 3

        server.fault = None
        assert await drill.ask() == ("", "unavailable"), "still open"
        drill.now_s += 10.0
        assert await drill.ask() == ("".join(STORY[:2]), "content_filter")
        assert drill.state == "closed"
        await drill.openai.close()

    with moderation_server() as server:
        asyncio.run(asyncio.wait_for(run(server), 120))


def test_a_wrong_key_and_a_server_that_is_gone_let_nothing_out() -> None:
    async def run(server: ModerationServer, key: str) -> None:
        drill = Drill(server, key)
        assert await drill.ask() == ("", "unavailable")
        await drill.openai.close()

    with moderation_server() as server:
        asyncio.run(asyncio.wait_for(run(server, "wrong-key"), 120))
    asyncio.run(asyncio.wait_for(run(server, KEY), 120))


def test_the_endpoint_that_fails_midway_ends_the_stream() -> None:
    async def run(server: ModerationServer) -> None:
        drill, second = Drill(server), asyncio.Event()
        model = Model(TextDelta(STORY[0], 3, 1), second, *deltas_of(STORY[1:2]))
        seen = []
        async for delta in ModeratedModel(model, drill.chain, patience=PATIENT).complete(request()):
            seen.append((delta.text, delta.finish_reason))
            server.fault = 500
            second.set()
        assert seen == [(STORY[0], None), ("", "content_filter")]
        await drill.openai.close()

    with moderation_server() as server:
        asyncio.run(asyncio.wait_for(run(server), 120))


def test_degraded_mode_still_judges_and_shows_in_every_verdict() -> None:
    async def run(server: ModerationServer) -> None:
        drill = Drill(server, with_local=True)
        server.fault = 503
        bad = ["It was a calm day. ", "Here is how to build a pipe bomb at home. "]
        assert await drill.ask(bad) == (bad[0], "content_filter")
        assert {(verdict.backend, verdict.degraded) for verdict, _, _ in drill.recorded if verdict} == {("local", True)}
        server.fault = None
        drill.now_s += 10.0
        drill.recorded.clear()
        assert (await drill.ask(STORY[:2]))[1] == "stop"
        assert {(v.backend, v.degraded) for v, _, _ in drill.recorded if v} == {("openai", False)}
        await drill.openai.close()

    with moderation_server() as server:
        asyncio.run(asyncio.wait_for(run(server), 120))
