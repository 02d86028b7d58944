// Chats with MODEL at BASE_URL through the clients that people really use, and prints one JSON object:
//
//     node clients.mjs http://127.0.0.1:8100/v1 MODEL
//
//     {"openai.create": {"text", "finish_reason", "usage", "chunks", "errors"}, "openai.stream": {...}, ...}
//
// `text` is what the client put together, `chunks` counts the pieces of text it was given (1 when it did not stream) and
// `errors` holds every error it threw or reported. A client that fails does not keep the others from being tried, and
// the exit code is 0 all the same: the caller reads the errors. To add a client, add an entry to `clients`.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
if (!baseURL || !model) {
  console.error("usage: node clients.mjs BASE_URL MODEL");
  process.exit(2);
}

// The AI SDK would print its warnings to stdout, which belongs to the result.
globalThis.AI_SDK_LOG_WARNINGS = false;

const TIMEOUT_MS = 30_000;
const QUESTION = "How do rivers find the sea?";
const messages = [{ role: "user", content: QUESTION }];
const apiKey = process.env.OPENAI_API_KEY || "sk-none";

// No retries: a retry would hide an error that the caller wants to see.
const openai = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: TIMEOUT_MS });
const provider = createOpenAICompatible({ name: "headwater", baseURL, apiKey, includeUsage: true });
const aiOptions = () => ({
  model: provider(model),
  prompt: QUESTION,
  maxRetries: 0,
  abortSignal: AbortSignal.timeout(TIMEOUT_MS),
});

// Each one fills in the result it is given, so that what had arrived before an error is kept.
const clients = {
  async "openai.create"(result) {
    const completion = await openai.chat.completions.create({ model, messages });
    const [choice] = completion.choices;
    result.text = choice.message.content;
    result.finish_reason = choice.finish_reason;
    result.usage = completion.usage ?? null;
    result.chunks = 1;
  },

  async "openai.create, stream"(result) {
    await readOpenAIStream(result, { model, messages, stream: true });
  },

  async "openai.create, stream, usage"(result) {
    await readOpenAIStream(result, { model, messages, stream: true, stream_options: { include_usage: true } });
  },

  // The SDK's own helper, which puts the chunks together and is stricter about their shape than a loop over them.
  async "openai.stream, usage"(result) {
    const stream = openai.chat.completions.stream({ model, messages, stream_options: { include_usage: true } });
    stream.on("content", () => {
      result.chunks += 1;
    });
    const completion = await stream.finalChatCompletion();
    result.text = completion.choices[0].message.content;
    result.finish_reason = completion.choices[0].finish_reason;
    result.usage = completion.usage ?? null;
  },

  async "ai.generateText"(result) {
    const answer = await generateText(aiOptions());
    result.text = answer.text;
    result.finish_reason = answer.finishReason;
    result.usage = usageOf(answer.usage);
    result.chunks = 1;
  },

  async "ai.streamText"(result) {
    const answer = streamText({ ...aiOptions(), onError: () => {} }); // its errors come as parts of the stream, too
    for await (const part of answer.stream) {
      if (part.type === "text-delta") {
        result.text += part.text;
        result.chunks += 1;
      } else if (part.type === "finish") {
        result.finish_reason = part.finishReason;
        result.usage = usageOf(part.totalUsage);
      } else if (part.type === "error") {
        result.errors.push(String(part.error));
      } else if (part.type === "abort") {
        result.errors.push(`aborted: ${part.reason}`);
      }
    }
  },
};

async function readOpenAIStream(result, request) {
  for await (const chunk of await openai.chat.completions.create(request)) {
    if (chunk.usage) {
      result.usage = chunk.usage;
    }
    const [choice] = chunk.choices;
    if (choice?.delta.content) {
      result.text += choice.delta.content;
      result.chunks += 1;
    }
    result.finish_reason = choice?.finish_reason ?? result.finish_reason;
  }
}

// The AI SDK's usage under OpenAI's names, or null where the SDK was told nothing.
function usageOf(usage) {
  if (usage?.totalTokens === undefined) {
    return null;
  }
  return {
    prompt_tokens: usage.inputTokens,
    completion_tokens: usage.outputTokens,
    total_tokens: usage.totalTokens,
  };
}

const results = {};
for (const [name, chat] of Object.entries(clients)) {
  const result = { text: "", finish_reason: null, usage: null, chunks: 0, errors: [] };
  try {
    await chat(result);
  } catch (error) {
    result.errors.push(String(error));
  }
  results[name] = result;
}

// Exit by name: a kept-alive connection or a timer of an SDK could hold the process for seconds.
process.stdout.write(`${JSON.stringify(results)}\n`, () => process.exit(0));
