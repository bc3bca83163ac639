"""What groups are asked for, and told to stage, on the way from what they hold to what they should hold."""

from collections.abc import Iterable

from router.group_state import GroupState, Slot, Wish
from router.membership import Member
from router.moves import MAX_STAGING, StageOrder, published, stage_orders

A, B, C = (0, 0), (0, 1), (0, 2)  # three experts of a layer


def member(
    name: str, held: Iterable[Slot] = (), staging: Iterable[Slot] = (), num_slots: int = 8, host: str = "host"
) -> Member:
    state = GroupState(
        name, address_of(name, host), num_slots, frozenset(held), frozenset(staging), 0.0, Wish(0, 2)
    )
    return Member(name, heard_at=0.0, state=state)


def address_of(name: str, host: str = "host") -> str:
    return f"{host}@127.0.0.1:1/{name}"


def target(**slots: Iterable[Slot]) -> dict[str, frozenset[Slot]]:
    return {name: frozenset(its) for name, its in slots.items()}


def test_an_expert_that_moves_is_asked_for_where_it_was_until_it_has_arrived():
    old, new = member("old", [A]), member("new", staging=[A])
    assert published([old, new], target(old=[], new=[A])) == {"old": {A}, "new": set()}
    new = member("new", [A])
    assert published([old, new], target(old=[], new=[A])) == {"old": set(), "new": {A}}


def test_an_expert_that_moves_to_two_groups_leaves_when_it_has_arrived_in_both():
    old, first, second = member("old", [A]), member("first", [A]), member("second")
    wanted = target(old=[], first=[A], second=[A])
    assert published([old, first, second], wanted)["old"] == {A}
    assert published([old, first, member("second", [A])], wanted)["old"] == set()


def test_a_full_group_gives_up_what_has_arrived_anywhere():
    full = member("full", [A, B], num_slots=2)
    wanted = target(full=[B, C], first=[A], second=[A])
    assert published([full, member("first", [A]), member("second")], wanted)["full"] == {B}


def test_what_should_be_nowhere_is_asked_for_where_it_is():
    assert published([member("a", [A])], target(a=[])) == {"a": {A}}


def test_what_is_held_comes_from_its_holder_and_the_rest_from_the_checkpoint():
    holder, taker = member("holder", [A]), member("taker")
    orders = stage_orders([holder, taker], target(holder=[A], taker=[A, B]), now_s=0)
    assert orders == {"taker": (StageOrder(*B, None), StageOrder(*A, address_of("holder")))}


def test_an_expert_that_nobody_holds_is_read_by_one_group_at_a_time():
    wanted = target(a=[A], b=[A])
    (reader,) = stage_orders([member("a"), member("b")], wanted, now_s=0)
    others = [member(name, staging=[A] if name == reader else []) for name in ("a", "b")]
    assert stage_orders(others, wanted, now_s=0) == {}


def test_holders_share_the_work_of_giving():
    holders = [member("a", [A, B]), member("b", [A, B])]
    wanted = target(a=[A, B], b=[A, B], c=[A, B])
    orders = stage_orders([*holders, member("c")], wanted, now_s=0)
    assert {order.peer for order in orders["c"]} == {address_of("a"), address_of("b")}


def test_a_holder_on_the_same_host_gives_before_all_others():
    holders = [
        member("far", [A, B], host="far"),
        member("near", [A, B]),
        member("further", [A], host="further"),
    ]
    orders = stage_orders([*holders, member("taker")], target(taker=[A, B]), now_s=0)
    assert {order.peer for order in orders["taker"]} == {address_of("near")}


def test_what_is_held_elsewhere_leaves_the_last_slot_free():
    holder = member("holder", [A])
    assert stage_orders([holder, member("b", [B], num_slots=2)], target(holder=[A], b=[A, B]), now_s=0) == {}


def test_no_group_is_told_to_stage_more_than_its_queue_takes():
    slots = [(layer, 0) for layer in range(2 * MAX_STAGING)]
    orders = stage_orders([member("a", num_slots=200)], target(a=slots), now_s=0)
    assert len(orders["a"]) == MAX_STAGING


def test_what_a_group_has_not_confirmed_to_have_freed_is_not_staged_again_yet():
    freeing = member("a", [A])
    freeing.freed = {A}
    assert stage_orders([freeing], target(a=[A]), now_s=0) == {}


def test_a_group_that_could_not_stage_is_spared_and_another_reads_what_both_lack():
    pausing, other = member("a"), member("b")
    pausing.stage_after = 5.0
    wanted = target(a=[A], b=[A])
    assert stage_orders([pausing, other], wanted, now_s=4.9).keys() == {"b"}
    assert stage_orders([pausing], wanted, now_s=5.0).keys() == {"a"}
