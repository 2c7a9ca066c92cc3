"""Clients and agents that people point at OpenAI's interface: each calls a tool and answers with its result."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from running_server import Running

QUESTION = "What's the weather in Paris?"
RESULT = {"temperature": 18, "condition": "sunny"}


def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The city.
    """
    asked.append(city)
    return json.dumps(RESULT)


asked: list[str] = []


@pytest.fixture(autouse=True)
def called(served: Running) -> list[str]:
    """Cities that the tool was asked for in this test."""
    asked.clear()
    return asked


def check(answer: str) -> None:
    """The answer says what the tool said."""
    assert asked == ["Paris"]
    assert "18" in answer
    assert "sunny" in answer


@pytest.mark.parametrize("interface", ["chat completions", "responses"])
def test_openai_agents(served: Running, interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")

    async def run() -> Any:
        openai = pytest.importorskip("openai")
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            kinds = {
                "chat completions": agents.OpenAIChatCompletionsModel,
                "responses": agents.OpenAIResponsesModel,
            }
            agent = agents.Agent(
                name="reporter",
                model=kinds[interface](model="tiny", openai_client=client),
                model_settings=agents.ModelSettings(temperature=0),
                tools=[agents.function_tool(get_weather)],
            )
            result = agents.Runner.run_streamed(agent, QUESTION, run_config=agents.RunConfig(tracing_disabled=True))
            async for _ in result.stream_events():
                pass
            return result.final_output

    check(asyncio.run(run()))


def test_langchain(served: Running) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    tools = pytest.importorskip("langchain_core.tools")
    messages = pytest.importorskip("langchain_core.messages")
    tool = tools.tool(get_weather)
    model = langchain_openai.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="none", model="tiny", temperature=0, max_retries=0
    ).bind_tools([tool])
    talk: list[Any] = [messages.HumanMessage(QUESTION)]
    talk.append(model.invoke(talk))
    talk += [tool.invoke(call) for call in talk[-1].tool_calls]
    parts = [chunk.content for chunk in model.stream(talk)]
    assert len(parts) > 2
    check("".join(parts))


def test_pydantic_ai(served: Running) -> None:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")
    provider = providers.OpenAIProvider(base_url=f"{served.url}/v1", api_key="none")
    agent = pydantic_ai.Agent(
        models.OpenAIChatModel("tiny", provider=provider), tools=[get_weather], model_settings={"temperature": 0}
    )
    check(agent.run_sync(QUESTION).output)


def test_llm(served: Running, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    llm = pytest.importorskip("llm")
    plugin = pytest.importorskip("llm.default_plugins.openai_models")
    model = plugin.Chat("tiny", model_name="tiny", api_base=f"{served.url}/v1", supports_tools=True)
    chain = model.chain(QUESTION, tools=[llm.Tool.function(get_weather)], options={"temperature": 0}, key="none")
    check(chain.text())
