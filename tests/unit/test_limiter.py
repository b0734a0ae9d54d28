"""The limiter against a strict server in simulated time, then each promise by itself."""

import math
import pickle
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.config import UserError
from alpaca_ray.provider.limit_headers import LimitHeaders, parse_limit_headers
from alpaca_ray.provider.limiter import Grant, Lease, Outcome, RateLimiter, cool_down_s
from alpaca_ray.provider.window import Charge, Pace
from tests.unit.limiter_simulation import StrictServer, World, most_within

W = 60.0
OK = Outcome("ok")
DOWN = Outcome("server_failure")
REFUSED = Outcome("rate_limited")


def drain(limiter: RateLimiter, now_s: float, until_s: float, tokens: int = 1) -> list[Lease]:
    """All leases up to `until_s` that one sender gets who always wants more; they stay open."""
    leases: list[Lease] = []
    while now_s < until_s:
        grant = limiter.acquire([tokens] * 16, now_s)
        leases += grant.leases
        now_s += grant.retry_in_s if len(grant.leases) < 16 else 0.0
    return leases


def one(limiter: RateLimiter, now_s: float, tokens: int = 1) -> Lease:
    (lease,) = limiter.acquire([tokens], now_s).leases
    return lease


def restart(world: World, requests: int | None, tokens: int | None, number: int) -> None:
    wait_s = cool_down_s(requests, tokens, world.server.window_s)
    world.limiter = RateLimiter(
        requests, tokens, window_s=world.server.window_s, cool_down_until_s=world.now_s + wait_s, epoch=str(number)
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, int | None, int | None]:
    """A world with a limit on requests, on tokens or on both."""
    requests = draw(st.none() | st.integers(1, 600))
    most_reserved = draw(st.integers(1, 4000))
    room = st.floats(1.0, 300.0)  # in reservations
    in_reservations = draw(room if requests is None else st.none() | room)
    tokens = None if in_reservations is None else math.ceil(in_reservations * most_reserved)
    most_used, longest_s = draw(st.floats(0.01, 1.0)), draw(st.floats(0.01, 90.0))
    world = World(
        StrictServer(requests or math.inf, tokens or math.inf, W),
        RateLimiter(requests, tokens, lease_timeout_s=30.0),
        random.Random(draw(st.integers(0, 2**32))),
        num_actors=draw(st.integers(1, 8)),
        batch=draw(st.integers(1, 16)),
        reserve=lambda rng: rng.randint(1, most_reserved),
        use=lambda rng, reserved: rng.randint(1, max(1, int(reserved * most_used))),
        latency_s=lambda rng: rng.uniform(0.0, longest_s),
        late_share=draw(st.sampled_from([0.0, 0.2])),
        crash_share=draw(st.sampled_from([0.0, 0.05])),
        says=draw(st.sampled_from(["nothing", "admitted", "answered"])),
    )
    return world, requests, tokens


@settings(max_examples=80, deadline=None)
@given(worlds(), st.lists(st.floats(0.0, 3.5 * W), max_size=3))
def test_the_server_sees_no_window_over_a_limit(
    drawn: tuple[World, int | None, int | None], restarts_s: list[float]
) -> None:
    world, requests, tokens = drawn
    for number, time_s in enumerate(restarts_s):
        world.at(time_s, partial(restart, world, requests, tokens, number + 1))
    world.start()
    world.run(4 * W)
    assert not world.server.refused_s
    if requests is not None:
        assert world.server.most_within(W) <= requests
        assert world.server.most_within(W / 60) <= math.ceil(2 * requests / 60)


@pytest.mark.parametrize("requests", [60, 500, 3000])
@pytest.mark.parametrize("num_actors", [1, 8])
@pytest.mark.parametrize("says", ["nothing", "answered"])
def test_the_request_limit_is_used(requests: int, num_actors: int, says: str) -> None:
    server = StrictServer(requests, math.inf, W)
    world = World(server, RateLimiter(requests, None), random.Random(0), num_actors, batch=16, says=says)
    world.start()
    world.run(4 * W)
    assert sum(W < time_s <= 4 * W for time_s in server.times_s) >= 0.95 * 3 * requests
    assert not server.refused_s


LATENCIES: list[Callable[[random.Random], float]] = [lambda rng: 0.05, lambda rng: rng.uniform(2, 20)]


@pytest.mark.parametrize("latency_s", LATENCIES)
@pytest.mark.parametrize("says", ["nothing", "admitted", "answered"])
def test_the_token_limit_is_used(latency_s: Callable[[random.Random], float], says: str) -> None:
    reserved, used, limit = 4000, 1500, 1_000_000
    server = StrictServer(math.inf, limit, W)
    world = World(
        server,
        RateLimiter(None, limit),
        random.Random(0),
        reserve=lambda rng: reserved,
        use=lambda rng, reserved: rng.randint(1000, 2000),
        latency_s=latency_s,
        jitter=0.1,
        says=says,
    )
    world.start()
    world.run(8 * W)
    # What is in flight holds its whole reservation, so evenly spread requests cannot use all of the limit.
    flight_s = sum(latency_s(random.Random(seed)) for seed in range(100)) / 100
    possible = limit * W * used / (W * used + flight_s * (reserved - used))
    in_steady_state = sum(tokens for time_s, tokens in server.used_tokens if 2 * W < time_s <= 7 * W) / 5
    assert in_steady_state >= 0.95 * possible
    assert not server.refused_s


def stalling_world(num_actors: int) -> World:
    """About 19 requests a second, of very different sizes, whose senders stall together every 5 s."""
    return World(
        StrictServer(math.inf, 1_668_000, W),
        RateLimiter(None, 1_668_000),
        random.Random(num_actors),
        num_actors,
        batch=16,
        reserve=lambda rng: rng.randint(3400, 3600),
        use=lambda rng, reserved: rng.randint(300, 2480),
        latency_s=lambda rng: rng.uniform(0.5, 1.5),
        jitter=0.9,
        bunch_s=5.0,
        says="answered",
    )


@pytest.mark.parametrize("num_actors", [1, 4, 8])
def test_no_second_is_above_twice_the_mean_where_tokens_bind(num_actors: int) -> None:
    world = stalling_world(num_actors)
    world.start()
    world.run(5 * W)
    steady_s = [time_s for time_s in world.server.times_s if 1.25 * W < time_s <= 4.75 * W]
    mean_per_s = len(steady_s) / (3.5 * W)
    assert most_within(1.0, steady_s) <= 2 * mean_per_s
    assert not world.server.refused_s  # its windows are exact: none was over the limit
    used = sum(tokens for time_s, tokens in world.server.used_tokens if 1.25 * W < time_s <= 4.75 * W)
    not_yet_used = mean_per_s * 1.0 * (3500 - 1390)  # reserved by those in flight, for 1 s each
    assert used / 3.5 + not_yet_used >= 0.95 * 1_668_000


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False), st.floats(0.0, 0.5))
def test_starts_given_back_late_make_room_and_no_more(rng: random.Random, late_share: float) -> None:
    limiter, sent_s, now_s = RateLimiter(None, 1_200_000), list[float](), 0.0
    under_way: list[Lease] = []
    while now_s < 8.0:
        under_way += limiter.acquire([1000] * 16, now_s).leases
        now_s += rng.uniform(0.05, 0.3)
        late = [lease for lease in under_way if lease.start_s < now_s and rng.random() < late_share]
        limiter.give_back([lease.id for lease in late], now_s)
        sent_s += [lease.start_s for lease in under_way if lease.start_s < now_s and lease not in late]
        under_way = [lease for lease in under_way if lease.start_s >= now_s]
    # Nothing is settled, so 1200 of them in 61 s is all that is known of their rate.
    assert most_within(1.9 - 1e-6, sent_s) <= 2 * 1200 / 61


def test_a_start_given_back_makes_room_for_another() -> None:
    pace = Pace(second_s=1.0, spread_s=0.9)
    charges = [Charge(0.1 * number, reserved=1) for number in range(15)]
    for charge in charges:
        pace.add(charge)
    assert pace.from_s(mean_gap_s=2 / 15) == 1.9  # 15 in 2 s are allowed
    pace.give_back(charges[3])
    assert pace.from_s(mean_gap_s=2 / 15) == -math.inf


def test_a_server_that_names_its_limits_needs_no_configuration() -> None:
    server = StrictServer(300, math.inf, W)
    world = World(server, RateLimiter(None, None), random.Random(0), says="answered")
    world.start()
    world.run(5 * W)
    assert not server.refused_s
    assert sum(2 * W < time_s <= 5 * W for time_s in server.times_s) >= 0.95 * 900


@pytest.mark.parametrize("limit", [60, 600])
def test_without_limits_or_headers_the_rate_is_found(limit: int) -> None:
    server = StrictServer(limit, math.inf, W)
    world = World(server, RateLimiter(None, None), random.Random(0), batch=4, latency_s=lambda rng: 1.0)
    world.start()
    world.run(20 * W)
    taken = sum(5 * W < time_s <= 20 * W for time_s in server.times_s)
    refused = sum(time_s > 5 * W for time_s in server.refused_s)
    assert taken >= 0.75 * 15 * limit
    assert refused <= 0.05 * taken


def test_others_under_the_same_key_are_left_their_share() -> None:
    server = StrictServer(600, math.inf, W)
    world = World(server, RateLimiter(600, None), random.Random(0), says="answered", latency_s=lambda rng: 1.0)
    refused_s: list[float] = []

    def other() -> None:
        if server.admit(world.now_s, 0) is None:
            refused_s.append(world.now_s)

    for number in range(400):  # 200 a minute for two minutes
        world.at(number * 0.3, other)
    world.start()
    world.run(5 * W)
    # Nobody can know how far others will still grow: some are refused, on both sides, where the sum reaches the limit.
    assert len(server.refused_s) <= 0.1 * 600
    assert len(refused_s) <= 0.15 * 400
    assert sum(1.2 * W < time_s <= 2 * W for time_s in server.times_s) >= 0.85 * 0.8 * 600
    world.run(9 * W)
    assert sum(time_s > 7 * W for time_s in server.times_s) >= 0.95 * 2 * 600  # they are gone, all of it is ours


def test_slots_are_spread_evenly_and_idle_time_is_not_saved_up() -> None:
    limiter = RateLimiter(60, None)
    first = one(limiter, 0.0)
    later = [lease.start_s for lease in drain(limiter, 1000.0, 1010.0)]
    assert first.start_s == 0.0
    assert later[0] == 1000.0
    gaps = {round(after - before, 6) for before, after in pairwise(later)}
    assert gaps == {round(61 / 60, 6)}


def test_a_grant_is_for_the_first_of_those_asked_for() -> None:
    limiter = RateLimiter(60, None)
    grant = limiter.acquire([5, 6, 7, 8, 9], 0.0)
    assert [lease.tokens for lease in grant.leases] == [5, 6]
    assert 0 < grant.retry_in_s <= 2.0
    assert limiter.acquire([], 0.0) == Grant((), 0.0)


def test_a_slot_given_back_is_had_again() -> None:
    limiter = RateLimiter(60, None)
    held = limiter.acquire([10, 10], 0.0).leases
    assert limiter.acquire([10], 0.0).leases == ()
    limiter.give_back([held[1].id, "unknown"], 0.5)
    again = one(limiter, 0.5, tokens=9)
    assert again.start_s == held[1].start_s
    assert again.id != held[1].id
    limiter.give_back([held[1].id], 0.6)  # a second time changes nothing
    state = limiter.snapshot(1.5)
    assert (state.requests_in_window, state.tokens_in_window, state.in_flight) == (2, 19, 2)


def test_tokens_count_as_reserved_until_they_are_settled() -> None:
    limiter = RateLimiter(None, 100)
    lease = one(limiter, 0.0, tokens=80)
    assert drain(limiter, 0.0, 50.0, tokens=80) == []
    limiter.settle(lease.id, Outcome("ok", 20), 50.0)
    assert limiter.snapshot(50.0).tokens_in_window == 20
    assert drain(limiter, 50.0, 51.0, tokens=80)[0].start_s <= 51.5


def test_a_request_of_unknown_usage_counts_in_full_for_a_window() -> None:
    limiter = RateLimiter(None, 100)
    lease = one(limiter, 0.0, tokens=80)
    limiter.settle(lease.id, OK, 1.0)
    assert drain(limiter, 1.0, 62.0, tokens=80)[0].start_s >= 61.0


def test_a_lease_that_is_never_settled_leaves_the_books() -> None:
    limiter = RateLimiter(None, 100, lease_timeout_s=10.0)
    lost = one(limiter, 0.0, tokens=80)
    assert limiter.snapshot(9.0).in_flight == 1
    assert limiter.acquire([80], 11.0).leases == ()  # it counts as used
    assert limiter.snapshot(11.0).in_flight == 0
    limiter.settle(lost.id, Outcome("ok", 1), 12.0)
    assert limiter.snapshot(12.0).tokens_in_window == 80
    assert one(limiter, 61.0, tokens=80).start_s == 61.0


def test_a_request_that_can_never_be_sent_is_refused() -> None:
    with pytest.raises(UserError, match=r"reserves 101 tokens.*100 per minute.*generate\.teacher\.max_tokens"):
        RateLimiter(None, 100).acquire([1, 101], 0.0)


@pytest.mark.parametrize(("configured", "named", "in_force"), [(100, 40, 40), (40, 100, 40), (None, 40, 40)])
def test_the_smaller_limit_counts(configured: int | None, named: int, in_force: int) -> None:
    limiter = RateLimiter(configured, configured)
    headers = LimitHeaders(limit_requests=named, limit_tokens=named)
    limiter.settle(one(limiter, 0.0).id, Outcome("ok", 1, headers), 1.0)
    state = limiter.snapshot(1.0)
    assert (state.requests_limit, state.tokens_limit) == (in_force, in_force)


def test_a_limit_per_day_says_nothing_about_the_window() -> None:
    limiter = RateLimiter(500, None)
    headers = LimitHeaders(limit_requests=200, remaining_requests=3, reset_requests_s=72_000.0)
    limiter.settle(one(limiter, 0.0).id, Outcome("ok", 1, headers), 1.0)
    assert limiter.snapshot(1.0).requests_limit == 500


def test_what_others_use_is_ours_again_after_the_reset() -> None:
    limiter = RateLimiter(600, None)
    headers = LimitHeaders(limit_requests=600, remaining_requests=300, reset_requests_s=30.0)
    limiter.settle(one(limiter, 0.0).id, Outcome("ok", 1, headers), 1.0)
    limit = limiter.snapshot(1.0).requests_limit
    assert limit is not None
    assert 300 <= limit < 330
    assert limiter.snapshot(31.0).requests_limit == 600


def test_retry_after_stops_everyone() -> None:
    limiter = RateLimiter(600, None)
    lease = one(limiter, 0.0)
    limiter.settle(lease.id, Outcome("rate_limited", 0, LimitHeaders(retry_after_s=20.0)), 1.0)
    assert drain(limiter, 1.0, 18.0) == []
    assert drain(limiter, 18.0, 25.0)[0].start_s == 21.0
    assert limiter.snapshot(1.0).paused_until_s == 21.0


def test_a_dead_limiters_lease_can_still_pause_but_frees_nothing() -> None:
    dead, limiter = RateLimiter(None, 100, epoch="dead"), RateLimiter(None, 100, epoch="new")
    theirs, ours = one(dead, 0.0, tokens=80), one(limiter, 0.0, tokens=80)
    assert theirs.id != ours.id
    limiter.settle(theirs.id, Outcome("rate_limited", 0, LimitHeaders(retry_after_s=7.0)), 1.0)
    state = limiter.snapshot(1.0)
    assert (state.tokens_in_window, state.in_flight, state.paused_until_s) == (80, 1, 8.0)


def test_refusals_that_name_no_time_pause_longer_each_time_and_one_burst_counts_once() -> None:
    limiter = RateLimiter(6000, None)
    now_s, pauses_s = 0.0, []
    for _ in range(9):
        leases = limiter.acquire([1] * 5, now_s).leases
        now_s = leases[-1].start_s + 0.1
        for lease in leases:
            limiter.settle(lease.id, REFUSED, now_s)
        pauses_s.append(round(limiter.snapshot(now_s).paused_until_s - now_s, 6))
        now_s += 1000.0
    assert pauses_s == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    limiter.settle(one(limiter, now_s).id, OK, now_s + 1)
    limiter.settle(one(limiter, now_s + 100).id, REFUSED, now_s + 101)
    assert limiter.snapshot(now_s).paused_until_s == now_s + 102


def test_a_refusal_cuts_the_rate_and_successes_bring_it_back() -> None:
    limiter = RateLimiter(None, None)
    limiter.settle(one(limiter, 0.0).id, OK, 0.5)
    leases = limiter.acquire([1] * 99, 1.0).leases
    assert len(leases) == 99  # no limit known: all at once
    for lease in leases:
        limiter.settle(lease.id, REFUSED, 2.0)
    cut = limiter.snapshot(2.0).requests_limit
    assert cut == pytest.approx(0.75 * 100 * 61 / 2)  # 100 in 2 s
    for lease in drain(limiter, 200.0, 261.0):
        limiter.settle(lease.id, OK, 261.0)
    grown = limiter.snapshot(261.0).requests_limit
    assert grown == pytest.approx((0.75 + 0.1) * 100 * 61 / 2, rel=0.02)  # after a window of successes


def test_a_known_limit_is_cut_by_a_quarter_and_comes_back() -> None:
    limiter = RateLimiter(600, None)
    limiter.settle(one(limiter, 0.0).id, REFUSED, 1.0)
    assert limiter.snapshot(1.0).requests_limit == 450
    now_s = 100.0
    while (limit := limiter.snapshot(now_s).requests_limit) != 600 and now_s < 600:
        for lease in drain(limiter, now_s, now_s + 10.0):
            limiter.settle(lease.id, OK, now_s + 10.0)
        now_s += 10.0
    assert limit == 600


def test_the_first_request_goes_alone_where_no_limit_is_known() -> None:
    limiter = RateLimiter(None, None)
    (first,) = limiter.acquire([1] * 5, 0.0).leases
    assert limiter.acquire([1] * 5, 1.0).leases == ()
    limiter.give_back([first.id], 2.0)
    (second,) = limiter.acquire([1] * 5, 2.0).leases
    limiter.settle(second.id, DOWN, 3.0)
    (third,) = limiter.acquire([1] * 5, 3.0).leases
    limiter.settle(third.id, OK, 4.0)
    assert len(limiter.acquire([1] * 5, 4.0).leases) == 5


def test_the_first_request_is_not_waited_for_for_ever() -> None:
    limiter = RateLimiter(None, None, lease_timeout_s=10.0)
    one(limiter, 0.0)
    assert limiter.acquire([1], 9.0).leases == ()
    assert len(limiter.acquire([1, 1], 10.0).leases) == 1


def failed(limiter: RateLimiter, now_s: float) -> None:
    for lease in limiter.acquire([1] * 10, now_s).leases:
        limiter.settle(lease.id, DOWN, now_s)


def test_the_breaker_opens_lets_one_through_and_closes_on_success() -> None:
    limiter = RateLimiter(6000, None)
    early = one(limiter, 0.0)
    failed(limiter, 1.0)
    assert limiter.snapshot(1.0).breaker == "open"
    limiter.settle(early.id, OK, 1.5)  # sent before it opened: says nothing about now
    assert limiter.snapshot(1.5).breaker == "open"
    (probe,) = limiter.acquire([1] * 10, 1.5).leases
    assert probe.start_s == 2.0
    assert limiter.snapshot(2.0).breaker == "half_open"
    assert limiter.acquire([1], 2.5).leases == ()
    limiter.settle(probe.id, OK, 3.0)
    assert limiter.snapshot(3.0).breaker == "closed"
    assert len(limiter.acquire([1] * 10, 3.0).leases) == 10


def test_each_failed_probe_doubles_the_wait_up_to_a_minute() -> None:
    limiter = RateLimiter(6000, None)
    failed(limiter, 0.0)
    now_s, waits_s = 0.0, []
    for _ in range(8):
        start_s = drain_one(limiter, now_s)
        waits_s.append(round(start_s.start_s - now_s, 6))
        now_s = start_s.start_s
        limiter.settle(start_s.id, DOWN, now_s)
    assert waits_s == [1, 2, 4, 8, 16, 32, 60, 60]


def drain_one(limiter: RateLimiter, now_s: float) -> Lease:
    while not (leases := (grant := limiter.acquire([1], now_s)).leases):
        now_s += grant.retry_in_s
    return leases[0]


def test_an_answer_of_any_kind_interrupts_a_row_of_failures() -> None:
    limiter = RateLimiter(6000, None)
    for number in range(30):
        outcome = Outcome("other") if number % 5 == 4 else DOWN
        limiter.settle(one(limiter, float(number)).id, outcome, number + 0.5)
    assert limiter.snapshot(30.0).breaker == "closed"


def test_a_new_limiter_waits_no_longer_than_it_must() -> None:
    assert cool_down_s(600, None) == pytest.approx(2.1, abs=0.01)
    assert cool_down_s(600, 1000) == cool_down_s(None, None) == pytest.approx(63.0)
    limiter = RateLimiter(600, None, cool_down_until_s=5.0)
    assert limiter.acquire([1], 0.0).leases == ()
    assert one(limiter, 4.0).start_s == 5.0


def test_everything_that_crosses_processes_pickles() -> None:
    limiter = RateLimiter(60, 100)
    grant = limiter.acquire([1, 2], 0.0)
    for value in (grant, OK, LimitHeaders(retry_after_s=1.0), limiter.snapshot(0.0)):
        assert pickle.loads(pickle.dumps(value)) == value


def test_headers_are_read() -> None:
    assert parse_limit_headers(
        {
            "X-RateLimit-Limit-Requests": "3500",
            "x-ratelimit-limit-tokens": "90000",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-remaining-tokens": "89000",
            "x-ratelimit-reset-requests": "17ms",
            "x-ratelimit-reset-tokens": "6m0s",
            "Retry-After": "2",
        }
    ) == LimitHeaders(3500, 90000, 0, 89000, 0.017, 360.0, 2.0)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "20"}, 20.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "1h2m"}, 3720.0),
        ({"retry-after": "1d1s"}, 86401.0),
        ({"retry-after-ms": "1500", "retry-after": "20"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "20"}, 20.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, None),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "yesterday"}, None),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert parse_limit_headers(headers).retry_after_s == seconds


NAMES = ["limit-requests", "limit-tokens", "remaining-requests", "remaining-tokens", "reset-requests", "reset-tokens"]
HEADERS = [f"x-ratelimit-{name}" for name in NAMES] + ["retry-after", "retry-after-ms", "date"]


@given(st.dictionaries(st.sampled_from(HEADERS), st.text() | st.from_regex(r"[0-9a-zµ:, .+-]{0,30}")))
def test_garbage_in_headers_is_no_error(headers: dict[str, str]) -> None:
    said = parse_limit_headers(headers)
    limiter = RateLimiter(None, None)
    limiter.settle(one(limiter, 0.0).id, Outcome("rate_limited", None, said), 1.0)
    assert limiter.snapshot(1.0).in_flight == 0
