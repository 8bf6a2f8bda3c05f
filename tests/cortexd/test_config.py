"""Loading settings: places, precedence, reference files, and errors that tell everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortexd.config import config_places, load_settings
from cortexd.config_env import Override
from cortexd.errors import ConfigError
from cortexd.settings import DefaultModel, NeuronEntry, Settings


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment whose home is empty."""
    return {"HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "xdg")}


def write(path: Path, text: str) -> Path:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def errors_of(tmp_path: Path, text: str, **environ: str) -> list[str]:
    """Return the error lines of a configuration file, with the folder cut off."""
    path = write(tmp_path / "cortex.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_settings(str(path), environ, tmp_path)
    lines = str(caught.value).replace(f"{tmp_path}/", "").split("\n")
    if len(lines) > 1:
        assert lines[0] == f"the configuration has {len(lines) - 1} errors:"
        return lines[1:]
    return lines


# Where settings come from


def test_nothing_configured_means_defaults(tmp_path: Path, home: dict[str, str]) -> None:
    """Without any file and variable the defaults hold."""
    loaded = load_settings(None, home, tmp_path)
    if loaded.source is None:  # a machine with /etc/cortex/cortex.toml has its own
        assert loaded.settings == Settings()
        assert loaded.warnings == ()


def test_places_are_searched_in_order(tmp_path: Path, home: dict[str, str]) -> None:
    """--config, $CORTEXD_CONFIG, the current folder, XDG: the first found is read."""
    named = write(tmp_path / "named.toml", "")
    variable = write(tmp_path / "variable.toml", 'role = "neuron"')
    here = write(tmp_path / "here" / "cortex.toml", "")
    xdg = write(tmp_path / "xdg" / "cortexd" / "cortex.toml", "")
    environ = {**home, "CORTEXD_CONFIG": str(variable)}
    assert load_settings("named.toml", environ, tmp_path).source == named
    assert load_settings(None, environ, here.parent).source == variable
    assert load_settings(None, home, here.parent).source == here
    assert load_settings(None, home, tmp_path).source == xdg
    assert config_places(home, tmp_path)[-1] == Path("/etc/cortex/cortex.toml")


def test_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """A file the user named is never replaced by another."""
    with pytest.raises(ConfigError, match=r"--config names .*absent.toml, which is not a file"):
        load_settings("absent.toml", {}, tmp_path)
    with pytest.raises(ConfigError, match=r"\$CORTEXD_CONFIG names"):
        load_settings(None, {"CORTEXD_CONFIG": str(tmp_path)}, tmp_path)


def test_command_line_wins_over_environment_over_file(tmp_path: Path) -> None:
    """Each source replaces the value of the one below it."""
    path = write(tmp_path / "c.toml", "[gateway]\nfronts = 2\nmax_body_mib = 2\nkeepalive_s = 2")
    environ = {"CORTEXD_GATEWAY__FRONTS": "3", "CORTEXD_GATEWAY__MAX_BODY_MIB": "3"}
    override = Override(("gateway", "fronts"), 4, "--fronts")
    gateway = load_settings(str(path), environ, tmp_path, [override]).settings.gateway
    assert (gateway.fronts, gateway.max_body_mib, gateway.keepalive_s) == (4, 3, 2.0)


# The reference's files


def test_reference_gateway_file_loads(tmp_path: Path) -> None:
    """The reference's gateway file is accepted as it is."""
    path = write(
        tmp_path / "cortex.toml",
        """
        models_config = "/etc/cortex/models.toml"
        [gateway]
        listen = "0.0.0.0:31313"
        metrics_listen = "0.0.0.0:31314"
        [eviction]
        strategy = "priority"
        defrag_after_cycles = 50
        [[neurons]]
        name = "beast"
        endpoint = "http://beast:13131"
        """,
    )
    settings = load_settings(str(path), {}, tmp_path).settings
    assert settings.models_config == "/etc/cortex/models.toml"
    assert settings.gateway.metrics_listen == "0.0.0.0:31314"
    assert settings.eviction.strategy == "priority"
    assert settings.eviction.defrag_after_cycles == 50
    assert settings.neurons == [NeuronEntry(name="beast", endpoint="http://beast:13131")]


def test_reference_neuron_file_loads(tmp_path: Path) -> None:
    """The reference's neuron side is accepted, its name of the engine too."""
    path = write(
        tmp_path / "neuron.toml",
        """
        [[default_models]]
        model_id = "Qwen/Qwen3-8B"
        harness = "candle"
        quant = "q4_k_m"
        tensor_parallel = 2
        devices = [0, 1]
        """,
    )
    settings = load_settings(str(path), {}, tmp_path).settings
    assert settings.neuron.listen == "127.0.0.1:13131"
    assert settings.default_models == [
        DefaultModel(
            model_id="Qwen/Qwen3-8B",
            harness="candle",
            quant="q4_k_m",
            tensor_parallel=2,
            devices=[0, 1],
        )
    ]


# The environment


def test_variables_are_typed_by_their_option(tmp_path: Path) -> None:
    """Strings as they are, numbers and booleans parsed, arrays as in the file."""
    environ = {
        "CORTEXD_ROLE": "neuron",
        "CORTEXD_NEURON__LISTEN": "127.0.0.1:1",
        "CORTEXD_ENGINE__MAX_NUM_SEQS": "8",
        "CORTEXD_GATEWAY__DRAIN_S": "5",
        "CORTEXD_STORE__OFFLINE": "true",
        "CORTEXD_STORE__PIP": '["uv", "pip"]',
        "CORTEXD_DEFAULT_MODELS": '[{model_id = "a/b"}, {model_id = "./c"}]',
        "OTHER": "x",
    }
    settings = load_settings(None, environ, tmp_path).settings
    assert settings.role == "neuron"
    assert settings.neuron.listen == "127.0.0.1:1"
    assert settings.engine.max_num_seqs == 8
    assert settings.gateway.drain_s == 5.0
    assert settings.store.offline is True
    assert settings.store.pip == ["uv", "pip"]
    assert [m.model_id for m in settings.default_models] == ["a/b", str(tmp_path / "c")]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CORTEXD_GATEWAY__LISTN", "x", 'did you mean "CORTEXD_GATEWAY__LISTEN"?'),
        ("CORTEXD_GATEWAY", "x", "names the table gateway; set one of its keys: CORTEXD_GATEWAY__"),
        ("CORTEXD_ZZZ", "x", "names no option (form: CORTEXD_SECTION__KEY"),
        ("CORTEXD_GATEWAY__FRONTS", "65", "gateway.fronts must be an integer from 1 to 64, not 65"),
        ("CORTEXD_GATEWAY__FRONTS", "two", 'gateway.fronts must be an integer from 1 to 64, not "'),
        ("CORTEXD_GATEWAY__FRONTS", "1\nx = 2", "gateway.fronts must be an integer"),
        ("CORTEXD_STORE__OFFLINE", "yes", 'store.offline must be true or false, not "yes"'),
        ("CORTEXD_GATEWAY__LISTEN", "x", 'gateway.listen: "x" is not an address'),
        ("CORTEXD_ROLE", "gatway", 'not "gatway"; did you mean "gateway"?'),
        ("CORTEXD_GATEWAY__ALLOWED_ORIGINS", '["*", "a.org"]', '[1]: "a.org" is not an origin'),
        (
            "CORTEXD_DEFAULT_MODELS",
            '[{model_id = "x"}]',
            'default_models[0].model_id: model id "x"',
        ),
    ],
)
def test_bad_variable_is_named(tmp_path: Path, variable: str, value: str, message: str) -> None:
    """An error of the environment names the variable, and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        load_settings(None, {variable: value}, tmp_path)
    assert str(caught.value).startswith(f"environment variable {variable}: ")
    assert message in str(caught.value)


def test_option_error_names_the_option(tmp_path: Path) -> None:
    """What came from the command line is looked for there."""
    override = Override(("gateway", "listen"), "nowhere", "--listen")
    with pytest.raises(ConfigError, match=r'^--listen: gateway\.listen: "nowhere"'):
        load_settings(None, {}, tmp_path, [override])


@pytest.mark.parametrize("variable", ["CORTEXD_CPU_ISA", "CORTEXD_KERNELS_DIR"])
def test_variables_of_the_kernels_are_no_options(variable: str, tmp_path: Path) -> None:
    """They are read elsewhere, so the configuration does not refuse them."""
    assert load_settings(None, {variable: "x"}, tmp_path) == load_settings(None, {}, tmp_path)


# Errors of the file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[gateway]\n\nlistne = 1", "3: gateway.listne is an unknown key; did you mean "),
        ("[gatway]", '1: gatway is an unknown key; did you mean "gateway"? known keys'),
        ('[gateway]\ndevice = "cpu"', '2: gateway.device is an unknown key; did you '
         'mean "engine.device"?'),
        ("[[nodes]]\nx = 1", "1: nodes is an unknown key; known keys at the top level: "
         "default_models, engine, entitlements, eviction"),
        ("gateway = 3", "1: gateway must be a table, not 3"),
        ("neurons = [1]", "1: neurons[0] must be a table, not 1"),
        ("[gateway]\nfronts = true", "2: gateway.fronts must be an integer from 1 to 64"
         ", not true"),
        ("[gateway]\nfronts = 1.0", "2: gateway.fronts must be an integer from 1 to 64"),
        ("[gateway]\ndrain_s = nan", "2: gateway.drain_s must be a number >= 0, not "
         "nan"),
        ("[gateway]\ndrain_s = 2024-01-01", "2: gateway.drain_s must be a number >= 0"
         ", not the date 2024-01-01"),
        ("[gateway]\nkeepalive_s = 0", "2: gateway.keepalive_s must be a number > 0"),
        ('[eviction]\nstrategy = "LRU"', '2: eviction.strategy must be one of "lru", '
         '"priority", not "LRU"'),
        ("[store]\npip = [\n 'a',\n 1]", "4: store.pip[1] must be a string, not 1"),
        ("[store]\npip = []", "2: store.pip is empty"),
        ('[paths]\nstate_dir = " "', "2: paths.state_dir is not a path"),
        ('[[neurons]]\nname = "a"', "1: neurons[0] lacks its endpoint; add endpoint = "),
        ('neurons = [\n{name = "a", endpoint = "http://a"},\n{name = "a", endpoint = "http://b"}]',
         '3: neurons[1].name = "a" is also that of neurons[0]'),
        ('[[neurons]]\nname = " "\nendpoint = "http://a"', "2: neurons[0].name is empty"),
        ('[[neurons]]\nname = "a"\nendpoint = "a:1"', '3: neurons[0].endpoint: "a:1" is '
         "not an endpoint"),
        ('[[default_models]]\nmodel_id = "a/b"\ndevices = [0, 1]', "3: default_models[0]"
         ".devices names 2 devices and tensor_parallel is 1"),
        ('[[default_models]]\nmodel_id = "a/b"\ndevices = [1, 1]\ntensor_parallel = 2',
         "3: default_models[0].devices names a device twice"),
        ('[[default_models]]\nmodel_id = "a/b"\ntensor_parallel = 0',
         "3: default_models[0].tensor_parallel must be an integer >= 1, not 0"),
        ('[[default_models]]\nmodel_id = "a/b"\nquant = ""', "3: default_models[0].quant"
         " is empty"),
        ('[[default_models]]\nmodel_id = "a"', '2: default_models[0].model_id: model id '
         '"a" has no slash'),
        ("[engine]\nmax_prefill_chunk = 4096", "2: engine.max_prefill_chunk = 4096 must "
         "be at most engine.max_num_batched_tokens = 2048"),
        ("[engine]\nmax_num_batched_tokens = 256", "2: engine.max_prefill_chunk = 512 "
         "must be at most engine.max_num_batched_tokens = 256"),
        ('[engine]\nactivations = "rounded"\nbackend = "reference"', "2: engine.activations = "
         '"rounded" is for the CPU\'s kernels, but engine.backend = "reference"; use "auto"'),
        ('[engine]\ndevice = "cuda"\nactivations = "rounded"', "3: engine.activations = "
         '"rounded" is for the CPU\'s kernels, but engine.device = "cuda"; use "auto"'),
        ('[engine]\nbackend = "exact"', "2: engine.backend"),
        ("[supervision]\nsuspect_after_s = 5", "2: supervision.suspect_after_s = 5.0 must"
         " be below supervision.kill_after_s = 5.0"),
        ("[supervision]\nheartbeat_ms = 2000", "2: supervision.suspect_after_s = 2.0 must"
         " be above supervision.heartbeat_ms = 2000"),
        ('[gateway]\nlisten = "0.0.0.0:31314"', "2: gateway.metrics_listen = 127.0.0.1:"
         "31314 uses the same port as gateway.listen = 0.0.0.0:31314"),
        ("x = " + "9" * 30, "1: x is an unknown key"),
        ("[engine]\nkv_cache_mib = -" + "9" * 30, "2: engine.kv_cache_mib must be an "
         "integer >= 0, not an integer beyond 64 bits"),
        ("[gateway]\ndrain_s = 1" + "0" * 400, "2: gateway.drain_s must be a number"),
    ],
)  # fmt: skip
def test_file_error_names_line_key_and_what_is_allowed(
    tmp_path: Path, text: str, expected: str
) -> None:
    """One mistake gives one line, with file, line, key, and what would be right."""
    lines = errors_of(tmp_path, text)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"cortex.toml:{expected}")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a = 1\nb = \n", "cortex.toml:2: not valid TOML: invalid value, column 5"),
        (b"a = [1,\n", "cortex.toml:1: not valid TOML: "),
        (b"a = 1\na = 2\n", "cortex.toml:2: not valid TOML: cannot overwrite a value"),
        (b"a = 1\n# \xff\n", "cortex.toml:2: not UTF-8 text"),
        (b"a = " + b"[" * 20000, "cortex.toml: arrays or tables are nested too deeply"),
        (b"a = " + b"9" * 5000, "cortex.toml: "),
        (b"#" * (5 << 20), "cortex.toml: larger than 4 MiB"),
    ],
)
def test_broken_file_names_file_and_line(tmp_path: Path, data: bytes, expected: str) -> None:
    """What is no TOML at all is refused with the place."""
    path = tmp_path / "cortex.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_settings(str(path), {}, tmp_path)
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(expected)


def test_all_errors_come_at_once_in_reading_order(tmp_path: Path) -> None:
    """One message holds every mistake, the file's in order, then the environment's."""
    lines = errors_of(
        tmp_path,
        """
        role = "x"
        [engine]
        block_size = 1
        max_prefill_chunk = 9999
        [[neurons]]
        nam = "a"
        endpoint = "http://a"
        [gateway]
        listen = "?"
        """,
        CORTEXD_ENGINE__DTYPE="int8",
        CORTEXD_NOPE="1",
    )
    places = [line.split(": ", 1)[0] for line in lines]
    assert places == [
        "cortex.toml:2",
        "cortex.toml:4",
        "cortex.toml:5",
        "cortex.toml:6",
        "cortex.toml:7",
        "cortex.toml:10",
        "environment variable CORTEXD_NOPE",
        "environment variable CORTEXD_ENGINE__DTYPE",
    ]


def test_failed_value_breaks_no_further_rule(tmp_path: Path) -> None:
    """A key that is wrong by itself is reported once, not again by rules that compare it."""
    lines = errors_of(tmp_path, '[engine]\nmax_num_batched_tokens = "many"')
    assert len(lines) == 1


# What the result looks like


def test_paths_become_absolute(tmp_path: Path) -> None:
    """Paths of the file are relative to it, those of the environment to the current folder."""
    path = write(
        tmp_path / "etc" / "cortex.toml",
        """
        models_config = "m.toml"
        [store]
        cache_dir = "~/cache"
        [paths]
        runtime_dir = "run"
        [[default_models]]
        model_id = "../models/a.gguf"
        """,
    )
    environ = {"HOME": "/home/me", "CORTEXD_PATHS__STATE_DIR": "state"}
    settings = load_settings(str(path), environ, tmp_path).settings
    assert settings.models_config == str(tmp_path / "etc/m.toml")
    assert settings.store.cache_dir == "/home/me/cache"
    assert settings.paths.runtime_dir == str(tmp_path / "etc/run")
    assert settings.paths.state_dir == str(tmp_path / "state")
    assert settings.default_models[0].model_id == str(tmp_path / "models/a.gguf")


def test_catalogue_beside_the_file_is_found(tmp_path: Path) -> None:
    """Without models_config, a models.toml in the same folder is the catalogue."""
    path = write(tmp_path / "cortex.toml", "")
    assert load_settings(str(path), {}, tmp_path).settings.models_config is None
    catalogue = write(tmp_path / "models.toml", "")
    assert load_settings(str(path), {}, tmp_path).settings.models_config == str(catalogue)


def test_open_listener_is_warned_about(tmp_path: Path) -> None:
    """Listening beyond this machine without keys gives a warning per address that is served."""
    environ = {"CORTEXD_GATEWAY__LISTEN": "0.0.0.0:1", "CORTEXD_NEURON__LISTEN": "[::]:2"}
    warnings = load_settings(None, environ, tmp_path).warnings
    assert [line.split(" ")[0] for line in warnings] == ["gateway.listen", "neuron.listen"]
    environ["CORTEXD_ROLE"] = "neuron"
    assert len(load_settings(None, environ, tmp_path).warnings) == 1


def test_listener_that_asks_for_keys_is_not_warned_about(tmp_path: Path) -> None:
    """Metrics never ask; optional keys are no keys; a neuron without a key file is."""
    environ = {
        "CORTEXD_GATEWAY__LISTEN": "0.0.0.0:1",
        "CORTEXD_GATEWAY__METRICS_LISTEN": "0.0.0.0:2",
        "CORTEXD_ENTITLEMENTS__KEYS_FILE": "keys.toml",
        "CORTEXD_NEURONS": '[{name = "a", endpoint = "http://a"}]',
    }
    loaded = load_settings(None, environ, tmp_path)
    assert loaded.settings.entitlements.keys_file == str(tmp_path / "keys.toml")
    first, second = loaded.warnings
    assert first.startswith('neuron "a" has no key_file')
    assert second.startswith("gateway.metrics_listen")
    environ["CORTEXD_ENTITLEMENTS__REQUIRE_AUTH"] = "false"
    warned = load_settings(None, environ, tmp_path).warnings
    assert [line.split(" ")[0] for line in warned] == ["gateway.listen", "gateway.metrics_listen"]


def test_role_that_ignores_a_table_warns(tmp_path: Path) -> None:
    """What a role does not use is said, not silently dropped."""
    neurons = '[{name = "a", endpoint = "http://a"}]'
    models = {
        "CORTEXD_DEFAULT_MODELS": '[{model_id = "a/b"}]',
        "CORTEXD_ROLE": "gateway",
        "CORTEXD_NEURONS": neurons,
    }
    assert "default_models" in load_settings(None, models, tmp_path).warnings[0]
    environ = {"CORTEXD_NEURONS": neurons, "CORTEXD_ROLE": "neuron"}
    assert "neurons" in load_settings(None, environ, tmp_path).warnings[0]


def test_gateway_without_neurons_is_refused(tmp_path: Path) -> None:
    """A gateway that has nothing to route to names the table that is missing."""
    (line,) = errors_of(tmp_path, 'role = "gateway"')
    assert "[[neurons]]" in line
    assert line.startswith("cortex.toml:1: ")
    text = 'role = "gateway"\n[[neurons]]\nname = "a"\nendpoint = "http://a"\nkind = "openai"'
    loaded = load_settings(str(write(tmp_path / "ok.toml", text)), {}, tmp_path)
    assert loaded.settings.neurons == [NeuronEntry(name="a", endpoint="http://a", kind="openai")]
