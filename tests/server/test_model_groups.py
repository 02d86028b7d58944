"""Model groups as administrators make them and tenants see them: what is taken, what is refused, who is told of which."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Proxy, Start, examples
from tests.server.test_auth import ADMIN, KEYS, admin, made_key

CONFIG = '[[model]]\nname = "ours"\ntargets = ["up/model-a", {target = "up2/model-b", weight = 2, context_tokens = 8}]'
GROUPS = "/model-groups"
PLAIN = {"weight": None, "context_tokens": None}


@pytest.fixture
async def proxy(start: Start) -> Proxy:
    """A proxy with two upstreams, an alias, and two teams."""
    proxy = await start(start.upstream.url, start.upstream.url, auth=KEYS, more=CONFIG)
    for team in ("alpha", "beta"):
        await made(proxy, "/teams", id=team)
    return proxy


async def made(proxy: Proxy, path: str = GROUPS, **fields: Any) -> Any:
    status, said = await admin(proxy, "POST", path, fields)
    assert status == 201, said
    return said


async def tenant(proxy: Proxy, key: str, path: str) -> tuple[int, Any]:
    """What a virtual key is answered."""
    async with proxy.get(path, headers={"Authorization": f"Bearer {key}"}) as response:
        return response.status, await response.json()


async def test_an_administrator_makes_changes_and_lists_groups(proxy: Proxy) -> None:
    group = await made(proxy, name="fast", models=["up/model-a", "up2/model-b"], cache="exact", team_ids=["alpha"])
    assert group == {
        "name": "fast",
        "models": [
            {"model": "up/model-a", "priority": 0, **PLAIN},
            {"model": "up2/model-b", "priority": 1, **PLAIN},
        ],
        "delivery": "stream",
        "recovery": None,
        "coalesce": None,
        "cache": "exact",
        "cache_ttl_s": None,
        "team_ids": ["alpha"],
        "is_active": True,
        "created_at": group["created_at"],
        "problems": ["the cache 'exact' is not open: no model of the config uses it"],
    }
    assert await admin(proxy, "GET", f"{GROUPS}/fast") == (200, group)
    changes = {"models": ["up2/b"], "coalesce": False, "delivery": "whole", "cache": None, "team_ids": None}
    _, changed = await admin(proxy, "PATCH", f"{GROUPS}/fast", changes | {"cache_ttl_s": 5, "recovery": "off"})
    models = [{"model": "up2/b", "priority": 0, **PLAIN}]
    assert changed == group | changes | {"models": models, "cache_ttl_s": 5, "recovery": "off", "problems": []}
    for action, is_active in (("deactivate", False), ("deactivate", False), ("activate", True)):
        expected = changed | {"is_active": is_active}
        assert await admin(proxy, "POST", f"{GROUPS}/fast/{action}") == (200, expected)
        assert await admin(proxy, "GET", f"{GROUPS}/fast") == (200, expected)
    await made(proxy, name="a/b", models=["up/x"])
    _, first = await admin(proxy, "GET", f"{GROUPS}?limit=1")
    _, rest = await admin(proxy, "GET", f"{GROUPS}?after=a/b")
    assert [first["total"], first["data"][0]["name"], rest["data"]] == [2, "a/b", [changed]]


ORDERS: list[tuple[list[Any], list[tuple[str, int]]]] = [
    (["up/a", "up/b"], [("up/a", 0), ("up/b", 1)]),
    ([{"model": "up/a", "priority": 2}, {"model": "up/b", "priority": 0}], [("up/b", 0), ("up/a", 2)]),
    ([{"model": "up/a", "priority": 4}, "up/b"], [("up/a", 4), ("up/b", 5)]),
    ([{"model": "up/b", "priority": 1}, {"model": "up/a", "priority": 1}], [("up/b", 1), ("up/a", 1)]),
    (
        [{"model": "up/a", "weight": 3}, {"model": "up/b", "weight": 1}, "up/c"],
        [("up/a", 0), ("up/b", 0), ("up/c", 1)],
    ),
]


async def test_models_are_asked_by_their_priority_and_else_as_they_are_given(proxy: Proxy) -> None:
    key = (await made_key(proxy, team="alpha"))["key"]
    for number, (models, expected) in enumerate(ORDERS):
        group = await made(proxy, name=f"group-{number}", models=models)
        assert [(model["model"], model["priority"]) for model in group["models"]] == expected
        _, resolved = await tenant(proxy, key, f"/api/model-groups/group-{number}/resolve")
        assert [resolved["primary_model"], *resolved["fallbacks"]] == [name for name, _ in expected]


A = ["up/a"]
WRONG: list[tuple[str, str, Any, str]] = [
    ("POST", "", {"models": A}, "400 missing_required_parameter name"),
    ("POST", "", {"name": "x"}, "400 missing_required_parameter models"),
    ("POST", "", {"name": "x", "models": A, "priority": 1}, "400 unknown_parameter priority"),
    ("POST", "", {"name": "", "models": A}, "400 invalid_value name"),
    ("POST", "", {"name": "a\nb", "models": A}, "400 invalid_value name"),
    ("POST", "", {"name": " a", "models": A}, "400 invalid_value name"),
    ("POST", "", {"name": "..", "models": A}, "400 invalid_value name"),
    ("POST", "", {"name": "ours", "models": A}, "409 model_group_exists name"),
    ("POST", "", {"name": "mine", "models": A}, "409 model_group_exists name"),
    ("POST", "", {"name": "x", "models": []}, "400 invalid_value models"),
    ("POST", "", {"name": "x", "models": ["a"]}, "400 invalid_value models"),
    ("POST", "", {"name": "x", "models": ["up/"]}, "400 invalid_value models"),
    ("POST", "", {"name": "x", "models": ["up3/a"]}, "400 invalid_value models"),
    ("POST", "", {"name": "x", "models": ["up/a", "up/a"]}, "400 invalid_value models"),
    ("POST", "", {"name": "x", "models": [{"model": "up/a", "wieght": 1}]}, "400 unknown_parameter models"),
    ("POST", "", {"name": "x", "models": [{"model": "up/a", "priority": -1}]}, "400 invalid_value models"),
    (
        *("POST", ""),
        {
            "name": "x",
            "models": [{"model": "up/a", "weight": 1}, {"model": "up/b", "weight": 1, "priority": 1}],
        },
        "400 invalid_value models",
    ),
    ("POST", "", {"name": "x", "models": A, "team_ids": ["no"]}, "404 team_not_found team"),
    ("POST", "", {"name": "x", "models": A, "team_ids": []}, "400 invalid_value team_ids"),
    ("POST", "", {"name": "x", "models": A, "cache": "yes"}, "400 invalid_value cache"),
    ("POST", "", [], "400 invalid_type None"),
    ("PATCH", "/mine", {"name": "x"}, "400 unknown_parameter name"),
    ("PATCH", "/mine", {"team_ids": ["no"]}, "404 team_not_found team"),
    ("PATCH", "/mine", {"models": ["up3/a"]}, "400 invalid_value models"),
    ("PATCH", "/no", {"cache": None}, "404 model_group_not_found model_group"),
    ("POST", "/no/activate", None, "404 model_group_not_found model_group"),
    ("GET", "/no", None, "404 model_group_not_found model_group"),
    ("GET", "?limit=x", None, "400 invalid_value limit"),
    ("GET", "?team=alpha", None, "400 invalid_value team"),
]


async def test_what_is_wrong_is_named_and_changes_nothing(proxy: Proxy) -> None:
    mine = await made(proxy, name="mine", models=A)
    for method, path, body, expected in WRONG:
        status, said = await admin(proxy, method, GROUPS + path, body)
        error = said["error"]
        assert f"{status} {error['code']} {error['param']}" == expected, (method, path, body)
    assert (await admin(proxy, "GET", GROUPS))[1]["data"] == [mine]


async def test_whatever_is_sent_is_answered(proxy: Proxy) -> None:
    """Never a 500; and what was taken can be found, resolved and changed by its name, whatever that is."""
    anything = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
    models = st.lists(
        st.sampled_from(["up/a", "up2/b/c", "up/", "no/x"])
        | st.fixed_dictionaries(
            {"model": st.sampled_from(["up/d", "up/e"])},
            optional={"priority": st.integers(-1, 3), "weight": anything, "context_tokens": anything},
        ),
        max_size=4,
    )
    others = st.sampled_from(["recovery", "delivery", "coalesce", "cache", "cache_ttl_s", "team_ids", "no"])
    bodies: list[dict[str, Any]] = []

    @examples(60)
    @given(
        st.fixed_dictionaries({"name": st.text(max_size=4) | anything, "models": models | anything}), others, anything
    )
    def collect(body: dict[str, Any], other: str, value: Any) -> None:
        bodies.append(body if value is None else body | {other: value})

    collect()
    bodies += [{"name": name, "models": A} for name in ("a/activate", "a/b/resolve", "50%", "a%2Fb", "?#&+", "é/ü 1")]
    key, taken = (await made_key(proxy))["key"], 0
    for body in bodies:
        status, said = await admin(proxy, "POST", GROUPS, body)
        assert status in (201, 400, 404, 409), (body, said)
        if status == 201:
            taken += 1
            path = "/" + quote(body["name"], safe="")
            for way in (path, path.replace("%2F", "/")):
                assert (await admin(proxy, "PATCH", GROUPS + way, {"delivery": "whole"}))[0] == 200, way
                assert (await admin(proxy, "POST", f"{GROUPS}{way}/activate"))[1]["name"] == body["name"]
                assert (await tenant(proxy, key, f"/api/model-groups{way}/resolve"))[1]["model_group"] == body["name"]
    assert taken >= 6


async def test_a_tenant_resolves_and_lists_what_it_may_ask_for_and_the_rest_never_was(proxy: Proxy) -> None:
    for name in ("for-all", "retired", "barred"):
        await made(proxy, name=name, models=["up/model-a", "up2/model-b"])
    await made(proxy, name="alphas", models=A, team_ids=["alpha"])
    await admin(proxy, "POST", f"{GROUPS}/retired/deactivate")
    mine = (await made_key(proxy, team="alpha", models=["for-*", "alphas", "ours", "retired"]))["key"]
    other = (await made_key(proxy, team="beta"))["key"]

    assert await tenant(proxy, mine, "/api/model-groups/for-all/resolve") == (
        200,
        {
            "model_group": "for-all",
            "primary_model": "up/model-a",
            "fallbacks": ["up2/model-b"],
            "models": [{"model": "up/model-a", **PLAIN}, {"model": "up2/model-b", **PLAIN}],
        },
    )
    _, alias = await tenant(proxy, other, "/api/model-groups/ours/resolve")
    assert alias["models"][1] == {"model": "up2/model-b", "weight": 2, "context_tokens": 8}
    for key, hidden in ((mine, ("retired", "barred", "no", "up/model-a")), (other, ("retired", "alphas", "model-a"))):
        for name in hidden:
            status, said = await tenant(proxy, key, f"/api/model-groups/{name}/resolve")
            assert (status, said["error"]["code"]) == (404, "model_group_not_found")
            assert said["error"]["message"] == f"There is no model group '{name}'."
    for key, expected in ((mine, {"ours", "for-all", "alphas"}), (other, {"ours", "for-all", "barred"})):
        _, listed = await tenant(proxy, key, "/v1/models")
        assert {model["id"] for model in listed["data"] if model["owned_by"] == "headwater"} == expected
        for name in ("for-all", "alphas", "retired"):
            assert (await tenant(proxy, key, f"/v1/models/{name}"))[0] == (200 if name in expected else 404)
    async with proxy.get("/admin/targets", headers=ADMIN) as response:
        targets = {row["target"]: [model["name"] for model in row["models"]] for row in (await response.json())["data"]}
    assert targets == {
        "up/model-a": ["ours", "for-all", "barred"],
        "up2/model-b": ["ours", "for-all", "barred"],
        "up/a": ["alphas"],
    }


async def test_without_keys_all_are_one_team_and_may_ask_for_every_group(start: Start) -> None:
    proxy = await start()
    await made(proxy, "/teams", id="alpha")
    await made(proxy, name="alphas", models=A, team_ids=["alpha"])
    assert (await tenant(proxy, "", "/api/model-groups/alphas/resolve"))[1]["primary_model"] == "up/a"
