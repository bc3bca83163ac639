from pathlib import Path

import pytest
import yaml

from cluster.settings import HttpSettings, ModelSettings, Settings, load_settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MODEL = "{name: m, checkpoint: c}"
MODELS = f"models: [{MODEL}]\n"


@pytest.fixture
def mistakes(tmp_path):
    """Return a function: the sentences that a YAML text is refused with, without the file's name."""

    def load(text: str | bytes) -> list[str]:
        path = tmp_path / "my.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError) as refused:  # noqa: PT011  # the caller looks at the message
            load_settings(path)
        lines = str(refused.value).splitlines()
        assert all(line.startswith(str(path)) for line in lines), lines
        return [line.removeprefix(str(path)).lstrip(": ") for line in lines]

    return load


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_that_comes_along_loads(path):
    assert load_settings(path).models


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(MODELS)
    assert load_settings(path) == Settings((ModelSettings("m", "c"),), HttpSettings())


def test_what_a_file_says_is_what_the_settings_hold(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(
        "http: {host: 0.0.0.0, port: 8123, gateways: 2, api_keys_env: KEYS, admin_keys_env: ADMIN,\n"
        "       drain_s: 5}\n"
        "models:\n"
        "  - {name: a-1.5_b, checkpoint: /models/a, engines: 2, engine_threads: 4, prefix_caching: false}\n"
        "  - {name: b, checkpoint: b, expert_groups: 3, expert_threads: 2, kv_cache_tokens: 4096}\n"
        "  - {name: c, checkpoint: c, kv_cache_fraction: 0.5, expert_deadline_s: 3, context_length: null}\n"
    )
    assert load_settings(path) == Settings(
        (
            ModelSettings("a-1.5_b", "/models/a", engines=2, engine_threads=4, prefix_caching=False),
            ModelSettings("b", "b", expert_groups=3, expert_threads=2, kv_cache_tokens=4096),
            ModelSettings("c", "c", kv_cache_fraction=0.5, expert_deadline_s=3.0),
        ),
        HttpSettings("0.0.0.0", 8123, 2, "KEYS", "ADMIN", 5.0),
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: 3\n" + MODELS, "unknown key 'model'; did you mean 'models'?"),
        ("http: {prot: 1}\n" + MODELS, "unknown key 'http.prot'; did you mean 'port'?"),
        (
            "models: [{name: m, checkpoint: c, expert_grups: 2}]",
            "unknown key 'models.0.expert_grups'; did you mean 'expert_groups'?",
        ),
        (
            "http: {colour: red}\n" + MODELS,
            "unknown key 'http.colour'; the keys here are host, port, gateways, api_keys_env, "
            "admin_keys_env, drain_s",
        ),
        ("1: 2\n" + MODELS, "unknown key '1'; the keys here are models, http"),
    ],
)
def test_an_unknown_key_comes_with_the_key_that_was_meant(mistakes, text, sentence):
    assert mistakes(text) == [sentence]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("http: {}", "key 'models' is missing"),
        ("models: [{name: m}]", "key 'models.0.checkpoint' is missing"),
        ("models: []", "models is []: "),
        ("models: [x]", "models.0 is 'x': "),
        ("models: 3", "models is 3: "),
        ("http: 8000\n" + MODELS, "http is 8000: "),
        ("http: {port: '8000'}\n" + MODELS, "http.port is '8000': "),
        ("http: {port: 65536}\n" + MODELS, "http.port is 65536: "),
        ("http: {gateways: 0}\n" + MODELS, "http.gateways is 0: "),
        ("models: [{name: 'two words', checkpoint: c}]", "models.0.name is 'two words': "),
        ("models: [{name: m, checkpoint: 3}]", "models.0.checkpoint is 3: "),
        ("models: [{name: m, checkpoint: c, engines: true}]", "models.0.engines is True: "),
        ("models: [{name: m, checkpoint: c, engines: 1.0}]", "models.0.engines is 1.0: "),
        ("models: [{name: m, checkpoint: c, expert_groups: -1}]", "models.0.expert_groups is -1: "),
        ("models: [{name: m, checkpoint: c, prefix_caching: 1}]", "models.0.prefix_caching is 1: "),
        ("models: [{name: m, checkpoint: c, kv_cache_fraction: 1}]", "models.0.kv_cache_fraction is 1: "),
        ("models: [{name: m, checkpoint: c, kv_cache_fraction: .nan}]", "models.0.kv_cache_fraction is nan"),
        ("models: [{name: m, checkpoint: c, expert_deadline_s: .inf}]", "models.0.expert_deadline_s is inf"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(mistakes, text, sentence):
    (line,) = mistakes(text)
    assert line.startswith(sentence)


def test_every_mistake_has_a_sentence(mistakes):
    text = (
        "models: [{name: m, checkpoint: c, engine: 1}, {name: n, checkpoint: c, max_running: 0}, {name: o}]"
    )
    lines = mistakes(text)
    assert len(lines) == 3
    assert "engine_threads" in lines[0] or "engines" in lines[0]
    assert lines[1].startswith("models.1.max_running is 0: ")
    assert lines[2] == "key 'models.2.checkpoint' is missing"


def test_two_models_of_one_name_are_refused(mistakes):
    assert mistakes(f"models: [{MODEL}, {MODEL}]") == [
        "two models are called 'm'; each needs a name of its own"
    ]


@pytest.mark.parametrize("text", ["", "- a list", "words"])
def test_a_file_without_a_mapping_is_told_what_to_hold(mistakes, text):
    (line,) = mistakes(text)
    assert line.startswith("must hold a mapping with a key 'models'")


@pytest.mark.parametrize(
    "text", ["a: b: c", "\x00", "models: [", "!!python/object:os.system {}", b"\xff\xfe\xff"]
)
def test_what_is_not_yaml_is_refused_in_one_line(mistakes, text):
    (line,) = mistakes(text)
    assert line.startswith("is not valid YAML: ")


@pytest.mark.parametrize("text", ["models: &a [*a]", "models: !!binary /w=="])
def test_yaml_that_is_more_than_values_is_refused(mistakes, text):
    (line,) = mistakes(text)
    assert line.startswith("holds more than plain values: ")


def test_a_missing_file_is_named_with_the_folder_to_look_in(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml does not exist; .* configs/"):
        load_settings(tmp_path / "none.yaml")


def test_a_folder_is_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)


def test_the_command_line_overrides_host_and_port_and_nothing_else():
    settings = Settings((ModelSettings("m", "c"),), HttpSettings(gateways=3))
    assert settings.on(None, None) == settings
    assert settings.on("0.0.0.0", 81).http == HttpSettings("0.0.0.0", 81, 3)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:81"),
        ("gpu-7.example.com", "http://gpu-7.example.com:81"),
        ("0.0.0.0", "http://127.0.0.1:81"),
        ("::", "http://[::1]:81"),
        ("2001:db8::7", "http://[2001:db8::7]:81"),
    ],
)
def test_the_url_is_where_a_client_on_this_machine_connects(host, url):
    assert HttpSettings(host, 81).url == url


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_of_the_command_line_must_exist(port):
    with pytest.raises(ValueError, match=f"--port is {port}; it must be from 1 to 65535"):
        Settings((ModelSettings("m", "c"),)).on(None, port)


@pytest.mark.parametrize(
    ("changed", "copies"),
    [
        ({}, True),
        ({"engines": 1}, False),
        ({"kv_copies": False}, False),
        ({"prefix_caching": False}, False),
    ],
)
def test_blocks_are_copied_where_another_engine_could_find_them(changed, copies):
    assert ModelSettings(**{"name": "a", "checkpoint": "a", "engines": 2, **changed}).copies_blocks == copies


def test_ray_is_asked_for_a_cpu_of_every_thread_and_gateway_and_for_room_to_scale():
    models = (
        ModelSettings("a", "a", engines=2, engine_threads=3, expert_groups=4, expert_threads=2),
        ModelSettings("b", "b"),  # as many threads as there are cores: Ray hears of one
        ModelSettings("c", "c", engines=2, engine_threads=3, tensor_parallel=2),
    )
    assert Settings(models, HttpSettings(gateways=2)).num_cpus == 2 + (2 * 3 + 9 * 2) + 1 + 2 * 2 * 3


def test_an_autoscaled_model_gets_room_for_its_most_groups_and_one_that_is_being_replaced():
    model = ModelSettings("a", "a", expert_groups=2, max_expert_groups=5)
    assert model.most_expert_groups == 6


@pytest.mark.parametrize("kind", ["api_keys", "admin_keys"])
def test_keys_come_from_the_named_variable(monkeypatch, kind):
    monkeypatch.setenv("KEYS", " one, two ,")
    assert getattr(HttpSettings(**{f"{kind}_env": "KEYS"}), kind)() == {"one", "two"}
    assert getattr(HttpSettings(), kind)() == frozenset()


def test_keys_of_one_kind_are_none_of_the_other(monkeypatch):
    monkeypatch.setenv("KEYS", "one")
    assert HttpSettings(api_keys_env="KEYS").admin_keys() == frozenset()
    assert HttpSettings(admin_keys_env="KEYS").api_keys() == frozenset()


@pytest.mark.parametrize("kind", ["api_keys", "admin_keys"])
def test_a_variable_without_keys_is_named(monkeypatch, kind):
    monkeypatch.setenv("KEYS", ",")
    with pytest.raises(ValueError, match=rf"http\.{kind}_env names KEYS, which is not set"):
        getattr(HttpSettings(**{f"{kind}_env": "KEYS"}), kind)()


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("gpu-7.example.com", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_only_this_machine_connects_to_a_loopback_address(host, is_loopback):
    assert HttpSettings(host).is_loopback is is_loopback


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"expert_replicas": 3, "expert_groups": 2}, "expert_replicas 3, but only 2 expert_groups"),
        ({"min_expert_groups": 1, "expert_groups": 2}, "min_expert_groups 1, but no max_expert_groups"),
        ({"max_expert_groups": 2, "expert_groups": 3}, "expert_groups 3, which must lie between"),
        (
            {"min_expert_groups": 3, "max_expert_groups": 4, "expert_groups": 2},
            "between min_expert_groups 3 and max_expert_groups 4",
        ),
        (
            {"min_expert_groups": 1, "max_expert_groups": 4, "expert_groups": 2, "expert_replicas": 2},
            "min_expert_groups 1, but expert_replicas 2, each of which needs a group of its own",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, keys, reason):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"models": [{"name": "m", "checkpoint": "c", **keys}]}))
    with pytest.raises(ValueError, match=reason):
        load_settings(path)


@pytest.mark.parametrize(
    ("keys", "slots"),
    [
        ({"expert_groups": 2}, 5),
        ({"expert_groups": 2, "expert_replicas": 2}, 8),
        ({"expert_groups": 4, "expert_replicas": 2}, 5),
        ({"expert_groups": 4, "min_expert_groups": 2, "max_expert_groups": 8}, 5),
        ({"expert_groups": 4, "expert_slots": 3}, 3),
    ],
)
def test_a_group_has_slots_for_its_share_and_one_more(keys, slots):
    assert ModelSettings("m", "c", **keys).slots_per_layer(num_experts=8) == slots
