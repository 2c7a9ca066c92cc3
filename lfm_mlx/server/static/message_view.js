// How a message looks; `actions` is what its buttons do.

import { node, show } from "./markdown.js";

const ENDINGS = {
  length: "cut off at the limit of tokens",
  repetition: "ended, because it repeated itself",
  stopped: "stopped",
};

function button(text, label, action) {
  const made = node("button", { type: "button", textContent: text });
  made.setAttribute("aria-label", label);
  made.addEventListener("click", action);
  return made;
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function numbers({ usage, seconds, finish }) {
  const parts = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens.toLocaleString()} in` + (cached ? ` (${cached.toLocaleString()} cached)` : ""));
    parts.push(`${usage.completion_tokens.toLocaleString()} out`);
    // From the first token on, so that one is not counted.
    if (seconds > 0) parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (ENDINGS[finish]) parts.push(ENDINGS[finish]);
  return parts.join(" · ");
}

export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = node("li", { className: `message ${message.role}` });
    this.reasoning = node("div");
    this.summary = node("summary");
    this.details = node("details", { className: "reasoning", hidden: true }, this.summary, this.reasoning);
    this.body = node("div", { className: "body" });
    this.calls = node("div", { className: "calls" });
    this.foot = node("div", { className: "actions" });
    const speaker = node("span", { className: "unseen", textContent: message.role === "user" ? "You:" : "Answer:" });
    this.element.append(speaker, this.body, this.foot);
    if (message.role === "assistant") {
      this.body.before(this.details);
      this.body.after(this.calls);
    }
    this.isDue = false;
    this.update({});
  }

  // Draw with the next frame, however often it is asked for.
  later(state) {
    this.state = state;
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.update(this.state);
    });
  }

  update({ isWriting = false, isLast = false }) {
    this.state = { isWriting, isLast };
    const { role, content, reasoning_content: thoughts, calls = [] } = this.message;
    this.element.classList.toggle("writing", isWriting);
    this.element.setAttribute("aria-busy", String(isWriting));
    if (role === "user") this.body.textContent = content;
    else show(this.body, content);
    this.details.hidden = !thoughts;
    if (thoughts && this.reasoning.textContent !== thoughts) this.reasoning.textContent = thoughts;
    this.summary.textContent = isWriting && !content && !calls.length ? "Thinking…" : "Thoughts";
    this.element.classList.toggle("waiting", isWriting && !thoughts && !content);
    if (this.shownCalls !== this.callKey(isWriting, isLast)) this.drawCalls(isWriting, isLast);
    this.drawFoot(isWriting, isLast);
  }

  callKey(isWriting, isLast) {
    return JSON.stringify([this.message.calls, this.message.results, isWriting, isLast]);
  }

  drawCalls(isWriting, isLast) {
    this.shownCalls = this.callKey(isWriting, isLast);
    const { calls = [], results } = this.message;
    const drawn = calls.map((call, index) => {
      const title = node("h3", {}, "Calls ", node("code", {}, call.function.name));
      const card = node("div", { className: "call" }, title, node("pre", {}, pretty(call.function.arguments)));
      if (results) card.append(node("label", {}, "Result", node("pre", { className: "result" }, results[index])));
      else if (isLast && !isWriting) {
        card.append(node("label", {}, "Result", node("textarea", { rows: 2, className: "result", spellcheck: false })));
      }
      return card;
    });
    if (calls.length && !results && isLast && !isWriting) {
      const give = button("Give the result", "Give the result of the call", () => {
        this.actions.give(this.message, [...this.calls.querySelectorAll("textarea")].map((area) => area.value));
      });
      give.className = "give";
      drawn.push(give);
    }
    this.calls.replaceChildren(...drawn);
  }

  drawFoot(isWriting, isLast) {
    const key = JSON.stringify([isWriting, isLast, numbers(this.message)]);
    if (this.shownFoot === key) return;
    this.shownFoot = key;
    const buttons = [];
    if (!isWriting) {
      const copy = button("Copy", "Copy the message", () => this.actions.copy(this.message.content, copy));
      buttons.push(copy);
      if (this.message.role === "user") buttons.push(button("Edit", "Edit from here", () => this.actions.edit(this.message)));
      if (this.message.role === "assistant" && isLast) {
        buttons.push(button("Regenerate", "Write the answer again", () => this.actions.regenerate()));
      }
      if (this.message.role === "assistant") {
        buttons.push(node("span", { className: "numbers" }, numbers(this.message)));
      }
    }
    this.foot.replaceChildren(...buttons);
  }
}
