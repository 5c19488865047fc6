"""Adapters chosen by the model's name, beside a model that drafts."""

import dataclasses
import shutil

import httpx
import jax
import numpy as np
import openai
import pytest

from internjax.decode.speculate import DraftModel
from internjax.hf.adapter import save_adapter
from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from internjax.model.lora import LoraConfig, init_lora
from serve.openai import create_app
from serve.pipeline import Params, Pipeline
from serve.server import start_server

LORA = LoraConfig(rank=4, alpha=8.0, targets=("query", "value", "down"))


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """A model, the same under another name, and an adapter of each."""
    root = tmp_path_factory.mktemp("adapters")
    fresh, rng = jax.device_get(init_lora(LORA, tiny_model.params, jax.random.key(1))), np.random.default_rng(2)
    trained = jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32), fresh)
    for base, adapter in (("base", "first"), ("other", "foreign")):
        save_model(root / base, config=tiny_model.config, params=tiny_model.params, tokenizer=tiny_model.tokenizer)
        save_adapter(root / adapter, LORA, trained, root / base, model_config=tiny_model.config)
    return root


@pytest.fixture(scope="module")
def pipeline(folders):
    model = open_model(folders / "base")
    sizes = {"num_slots": 2, "max_context": 128, "max_adapters": 2, "adapters": {"first": folders / "first"}}
    with Pipeline(model, **sizes, speculation=DraftModel(model.config, num_drafts=2), draft=model) as pipeline:
        yield pipeline


def assert_greedy(model, result, prompt):
    """Every token is the most likely one of the model as it stands in a folder."""
    ids = [*prompt, *result.ids]
    best = np.asarray(logits(model, [ids]))[0].argmax(axis=-1)
    assert [*result.ids] == best[len(prompt) - 1 : -1].tolist()


def test_the_name_of_the_model_chooses_the_adapter(pipeline, folders):
    prompt, greedy = [5, 6, 7] * 7, {"max_tokens": 24, "temperature": 0}
    base, adapted = open_model(folders / "base"), open_model(folders / "base", adapters=[folders / "first"])
    plain = pipeline.complete(prompt, Params(max_tokens=24, temperature=0.0)).result()
    assert_greedy(base, plain, prompt)
    changed = pipeline.complete(prompt, Params(max_tokens=24, temperature=0.0, adapter="first")).result()
    assert_greedy(adapted, changed, prompt)
    stats = pipeline.engine.stats()
    assert stats.num_turns < stats.num_drawn_tokens  # the model drafts for itself: what it says comes true
    with start_server(pipeline, model_name="tiny", drain_seconds=1) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            assert [model.id for model in client.models.list()] == ["tiny", "first"]
            assert client.models.retrieve("first").parent == "tiny"
            for name, result in (("tiny", plain), ("first", changed)):
                answer = client.completions.create(model=name, prompt=prompt, **greedy)
                assert (answer.model, answer.choices[0].text) == (name, result.text)
                # Pages are shared with those who asked the same of the same adapter, and said so.
                assert answer.usage.prompt_tokens_details.cached_tokens == 20
            with pytest.raises(openai.NotFoundError, match="'second' is not served here; 'tiny', 'first' are"):
                client.completions.create(model="second", prompt="x")


def test_adapters_come_and_go(pipeline, folders):
    pipeline.load_adapter("second", folders / "first")
    assert pipeline.adapters == ("first", "second")
    with pytest.raises(ValueError, match="places are taken"):
        pipeline.load_adapter("third", folders / "first")
    pipeline.unload_adapter("second")
    with pytest.raises(ValueError, match="'second' is not loaded"):
        pipeline.complete("x", Params(adapter="second"))
    with pytest.raises(ValueError, match=r"was trained on .*other"):
        pipeline.load_adapter("foreign", folders / "foreign")
    with pytest.raises(ValueError, match="no adapter_config.json"):
        pipeline.load_adapter("base", folders / "base")
    with pytest.raises(ValueError, match="are both named 'first'"):
        create_app(pipeline, model_name="first")


def test_drafts_of_another_vocabulary_are_refused(pipeline, tiny_model, folders):
    swapped = dataclasses.replace(tiny_model.tokenizer)
    object.__setattr__(swapped, "token", lambda token_id: tiny_model.tokenizer.token(token_id ^ 1))
    draft = dataclasses.replace(tiny_model, tokenizer=swapped)
    with pytest.raises(ValueError, match="the same tokenizer"):
        Pipeline(tiny_model, speculation=DraftModel(tiny_model.config), draft=draft)
    with pytest.raises(ValueError, match="merge it"):
        Pipeline(tiny_model, speculation=DraftModel(tiny_model.config), draft=dataclasses.replace(draft, lora=object()))


def test_clients_load_and_unload_adapters(pipeline, folders, eventually):
    with start_server(pipeline, model_name="tiny", drain_seconds=1, adapter_root=folders) as server:

        def post(what: str, **body) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/{what}_lora_adapter", json=body, timeout=60)

        def refused(response: httpx.Response, status: int, param: str, said: str) -> None:
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, param) and said in error["message"], error

        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

            def say(name: str):
                return client.completions.create(model=name, prompt=[5, 6, 7] * 7, max_tokens=12, temperature=0)

            for path in ("first", str(folders / "first"), "first/../first/"):
                answer = post("load", lora_name="new", lora_path=path, load_inplace=False)
                assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
                assert client.models.retrieve("new").parent == "tiny"
                assert say("new").choices[0].text == say("first").choices[0].text != say("tiny").choices[0].text
                if path != "first":
                    answer = post("unload", lora_name="new")
                    assert (answer.status_code, answer.text) == (
                        200,
                        "Success: LoRA adapter 'new' removed successfully.",
                    )
                    continue
                for name in ("new", "tiny"):
                    taken = post("load", lora_name=name, lora_path="first")
                    refused(taken, 400, "lora_name", f"'{name}' is served already")
                refused(post("load", lora_name="third", lora_path="first"), 400, "lora_path", "all 2 places are taken")
                stream = client.completions.create(model="new", prompt="x", max_tokens=100, stream=True, n=2)
                next(iter(stream))
                refused(post("unload", lora_name="new"), 409, "lora_name", "requests use adapter 'new'")
                stream.close()
                eventually(lambda: post("unload", lora_name="new").status_code == 200)
            with pytest.raises(openai.NotFoundError, match="'new' is not served here"):
                say("new")
        refused(post("unload", lora_name="new"), 404, "lora_name", "'new' is not loaded; there are: first")
        refused(post("unload", lora_name="first", lora_int_id=1), 400, "lora_int_id", "by their names")
        refused(
            post("load", lora_name="x", lora_path="first", load_inplace=True), 400, "load_inplace", "unload it first"
        )
        refused(post("load", lora_name="x y", lora_path="first"), 400, "lora_name", "pattern")
        refused(post("load", lora_name="x", path="first"), 400, "lora_path", "required")
        for path, said in (("foreign", "was trained on"), ("base", "base has no adapter_config.json")):
            answer = post("load", lora_name="x", lora_path=path)
            refused(answer, 400, "lora_path", said)
            assert f"{folders}/{path}" not in answer.text and f"{folders}/base" not in answer.text
        refused(post("load", lora_name="x", lora_path="nowhere"), 404, "lora_path", "there is no folder 'nowhere'")
        for name, content in (("adapter_config.json", b"{"), ("adapter_model.safetensors", b"\xff" * 99)):
            broken = folders / f"broken {name}"
            shutil.copytree(folders / "first", broken)
            (broken / name).write_bytes(content)
            answer = post("load", lora_name="x", lora_path=broken.name)
            assert answer.status_code == 400 and broken.name in answer.text and str(folders) not in answer.text
        assert pipeline.adapters == ("first",)


def test_no_path_leads_out_of_the_folder(scripted, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root beside"
    for folder in (root / "linked file", outside):
        folder.mkdir(parents=True)
    (outside / "adapter_config.json").write_text("{}")
    (root / "linked file" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    paths = [
        "..",
        ".",
        "linked",
        "linked file",
        "loop",
        "../root beside",
        "linked file/../../root beside",
        str(outside),
    ]
    paths += ["/", "/etc", str(root), f"{root} beside", "../nowhere", "/nowhere", "a\0b", "x" * 5000, "$HOME/.."]
    pipeline = scripted("said")
    pipeline.load_adapter = None  # nothing is to get so far
    with start_server(pipeline, model_name="tiny", drain_seconds=1, api_key="key", adapter_root=root) as server:
        for path in paths:
            body, headers = {"lora_name": "x", "lora_path": path}, {"Authorization": "Bearer key"}
            answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "lora_path"), path
            assert error["message"].startswith("lora_path must name a folder below"), path
        for what in ("load", "unload"):
            assert httpx.post(f"{server.url}/v1/{what}_lora_adapter", json=body).status_code == 401
    with start_server(scripted("said"), model_name="tiny", drain_seconds=1) as server:
        for what in ("load", "unload"):
            assert httpx.post(f"{server.url}/v1/{what}_lora_adapter", json=body).status_code == 404
        assert "lora" not in httpx.get(f"{server.url}/openapi.json").text
    with pytest.raises(ValueError, match="is not there"):
        create_app(pipeline, model_name="tiny", adapter_root=tmp_path / "nowhere")
