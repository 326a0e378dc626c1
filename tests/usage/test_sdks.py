"""The providers' SDKs: each field of their usage classes is read, told as unread, or listed as no count.

The test walks the classes, so that a new release with a new field fails it.
"""

import importlib
import warnings
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from ducto_pg.usage import read, table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import botocore.session
    from anthropic import types as anthropic
    from anthropic.types import beta as anthropic_beta
    from google.genai import types as gemini
    from google.genai._gaos.types.interactions import usage as interactions
    from mistralai.client import models as mistral
    from mistralai.client.models.createresponseresponse import ResponsesUsage
    from openai import types as openai
    from openai.types import audio, beta, completion_usage, live, realtime, responses
    from openai.types.beta.threads import run
    from openai.types.beta.threads.runs import run_step
    from openai.types.responses import response

CLASSES: list[tuple[str, type[BaseModel]]] = [
    ("openai_chat", completion_usage.CompletionUsage),
    ("openai_chat", run.Usage),
    ("openai_chat", run_step.Usage),
    ("openai_embeddings", openai.create_embedding_response.Usage),
    ("openai_responses", responses.ResponseUsage),
    ("openai_responses", beta.beta_response_usage.BetaResponseUsage),
    ("openai_responses", openai.BatchUsage),
    ("openai_responses", openai.images_response.Usage),
    ("openai_responses", openai.image_gen_completed_event.Usage),
    ("openai_responses", openai.image_edit_completed_event.Usage),
    ("openai_audio", audio.transcription.UsageTokens),
    ("openai_audio", audio.transcription.UsageDuration),
    ("openai_audio", audio.transcription_diarized.UsageTokens),
    ("openai_audio", audio.transcription_text_done_event.Usage),
    ("openai_audio", audio.transcription_verbose.Usage),
    ("openai_audio", realtime.RealtimeResponseUsage),
    ("openai_audio", live.session_usage.SessionUsage),
    ("anthropic_messages", anthropic.Usage),
    ("anthropic_messages", anthropic.MessageDeltaUsage),
    ("anthropic_messages", anthropic_beta.BetaUsage),
    ("anthropic_messages", anthropic_beta.BetaMessageDeltaUsage),
    ("gemini_content", gemini.GenerateContentResponseUsageMetadata),
    ("gemini_content", gemini.UsageMetadata),
    ("gemini_interactions", interactions.Usage),
    ("mistral_chat", mistral.UsageInfo),
    ("mistral_chat", mistral.ConversationUsageInfo),
    ("mistral_ocr", mistral.OCRUsageInfo),
    ("openai_responses", ResponsesUsage),
]

# Fields of these classes that carry no count: texts, and what is not part of this call's own usage.
NO_COUNT = {
    "fallback_credit.status.type",  # whether Anthropic prices a retry otherwise: words
    "fallback_credit.status.reason",
    "fallback_credit.status.remove_to_redeem[]",
    "inference_geo",
    "comparison_response_id",
    "service_tier",
    "speed",
    "traffic_type",
    "type",
}


def fields(kind: Any, path: str = "") -> Iterator[str]:
    """The paths of a class's fields, down to numbers and texts; `[]` for a list, `.*` for a dict of counts."""
    for name, field in kind.model_fields.items():
        yield from _below(field.annotation, f"{path}.{name}" if path else name)


def _below(annotation: Any, path: str) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from fields(annotation, path)
        return
    origin, arms = get_origin(annotation), [arm for arm in get_args(annotation) if arm is not NoneType]
    if origin in (list, dict):
        yield f"{path}[]" if origin is list else f"{path}.*"
    elif origin in (Union, UnionType, Annotated) and any(not isinstance(arm, type) or arm is not str for arm in arms):
        yield from dict.fromkeys(
            found for arm in arms[: 1 if origin is Annotated else None] for found in _below(arm, path)
        )
    else:
        yield path


def is_known(api: str, path: str) -> bool:
    known = table.expanded()["apis"][api]
    paths = {*known["counted"], *known["no_count"], *known["unread"]}
    if path in NO_COUNT:
        return True
    if path.endswith("[]"):
        at = (known["parts"] or {}).get("at")
        return path[:-2] == at or any(one.startswith(path[:-1]) for one in paths)
    if path.endswith(".*"):
        return any(one.startswith(path[:-1]) for one in paths)
    return path in paths or any(one.startswith(f"{path}.") for one in paths)


@pytest.mark.parametrize(("api", "kind"), CLASSES, ids=[f"{kind.__module__}.{kind.__name__}" for _, kind in CLASSES])
def test_each_field_of_a_usage_class_is_known(api: str, kind: type[BaseModel]) -> None:
    found = list(fields(kind))
    assert len(found) > 0
    assert [path for path in found if not is_known(api, path)] == []


def test_what_lies_beside_the_usage_of_a_response() -> None:
    found = [f"tool_usage.{path}" for path in fields(response.ToolUsage)]
    found += [f"svg_usage.{path}" for path in fields(openai.images_response.SvgUsage)]
    assert [path for path in found if not is_known("openai_responses", path)] == ["svg_usage.model"]


def test_each_modality_is_known() -> None:
    gemini_kinds = [kind.value for kind in gemini.MediaModality if kind.value != "MODALITY_UNSPECIFIED"]
    api = table.expanded()["apis"]["gemini_content"]
    paths = {*api["counted"], *api["no_count"]}
    for name in ("prompt_tokens_details", "tool_use_prompt_tokens_details", "cache_tokens_details"):
        assert {f"{name}[{kind}].token_count" for kind in gemini_kinds} <= paths, name
    assert "candidates_tokens_details[VIDEO].token_count" not in paths  # unread: no count of ours is output video


def test_anthropics_iterations_are_bodies() -> None:
    for name in ("Message", "Compaction", "AdvisorMessage", "FallbackMessage"):
        module = importlib.import_module("anthropic.types.beta")
        kind = getattr(module, f"Beta{name}IterationUsage")
        assert [path for path in fields(kind) if not is_known("anthropic_messages", path)] in ([], ["model"]), name


def test_the_shapes_of_bedrock() -> None:
    model = botocore.session.get_session().get_service_model("bedrock-runtime")
    usage = model.shape_for("TokenUsage").members
    for name, shape in usage.items():
        if shape.type_name == "list":
            for ttl in model.shape_for("CacheTTL").enum:
                assert list(shape.member.members) == ["ttl", "inputTokens"]
                assert is_known("bedrock_converse", f"{name}[{ttl}].inputTokens")
        else:
            assert is_known("bedrock_converse", name), name


def test_objects_of_the_sdks_are_read() -> None:
    chat = completion_usage.CompletionUsage(prompt_tokens=9, completion_tokens=4, total_tokens=13)
    claude = anthropic.Usage(input_tokens=5, output_tokens=4, cache_read_input_tokens=4)
    google = gemini.GenerateContentResponse(
        model_version="g",
        usage_metadata=gemini.GenerateContentResponseUsageMetadata(
            prompt_token_count=9,
            candidates_token_count=4,
            prompt_tokens_details=[gemini.ModalityTokenCount(modality=gemini.MediaModality.AUDIO, token_count=9)],
        ),
    )
    for body in (chat, claude, google, mistral.UsageInfo(prompt_tokens=9, completion_tokens=4, total_tokens=13)):
        assert (read(body).input_tokens, read(body).output_tokens) == (9, 4)
    assert read(google).model == "g"
    assert read(google).input_audio_tokens == 9
    assert read({"usage": audio.transcription.UsageDuration(seconds=8.5, type="duration")}).audio_seconds
