// The server's chat completions, as a stream.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function refusal(response) {
  let text = `the server answered ${response.status}`;
  try {
    text = (await response.json()).error.message;
  } catch {
    // Not from this server: the status has to do.
  }
  return new ServerError(text, response.status);
}

// The models that may be asked.
export async function listModels(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

// The data of a response's events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Ask, and yield the parts of the answer: {reasoning}, {content}, {call}, {finish} or {usage}.
export async function* complete(body, key, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(key), body: JSON.stringify(asked), signal,
  });
  if (!response.ok) throw await refusal(response);
  let isDone = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") {
      isDone = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, 500);
    if (chunk.usage) yield { usage: chunk.usage };
    for (const { delta, finish_reason: finish, stop_reason: stop } of chunk.choices) {
      if (delta.reasoning_content) yield { reasoning: delta.reasoning_content };
      if (delta.content) yield { content: delta.content };
      for (const call of delta.tool_calls ?? []) yield { call };
      if (finish) yield { finish: stop === "repetition" ? stop : finish };
    }
  }
  if (!isDone) throw new ServerError("the connection ended before the answer did", 0);
}
