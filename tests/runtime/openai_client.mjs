// Asks every endpoint that OpenAI's client for Node knows and this server has; prints what came back as one JSON object.
// usage: node openai_client.mjs FOLDER_WITH_NODE_MODULES BASE_URL MODEL
import { createRequire } from "node:module";

const [folder, baseURL, model] = process.argv.slice(2);
const { OpenAI } = createRequire(folder + "/")("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Grüße, 世界 😀" }];
const found = {};

found.models = [];
for await (const item of client.models.list()) found.models.push(item.id);
found.retrieved = (await client.models.retrieve(model)).id;

const chat = await client.chat.completions.create({ model, messages, logprobs: true, top_logprobs: 1 });
found.chat = chat.choices[0].message.content;
found.chatUsage = chat.usage;

found.chatStream = "";
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true, stream_options: { include_usage: true } })) {
  found.chatStream += chunk.choices[0]?.delta?.content ?? "";
  found.chatStreamUsage = chunk.usage ?? found.chatStreamUsage;
}
const runner = client.chat.completions.stream({ model, messages });
found.chatRunner = (await runner.finalChatCompletion()).choices[0].message.content;

found.completion = (await client.completions.create({ model, prompt: "abc", echo: true })).choices[0].text;
found.completionStream = "";
for await (const chunk of await client.completions.create({ model, prompt: "abc", stream: true })) found.completionStream += chunk.choices[0].text;

const embeddings = await client.embeddings.create({ model, input: ["a", "b"] });
found.embeddings = embeddings.data.map((item) => item.embedding);

const response = await client.responses.create({ model, input: "héllo" });
found.response = response.output_text;
const responses = client.responses.stream({ model, input: "héllo" });
found.responseEvents = [];
for await (const event of responses) if (found.responseEvents.at(-1) !== event.type) found.responseEvents.push(event.type);
found.responseStream = (await responses.finalResponse()).output_text;

found.errors = [];
for (const ask of [
  () => client.chat.completions.create({ model, messages: [] }),
  () => client.responses.create({ model, input: "a", store: true }),
  () => client.models.retrieve("other"),
]) {
  try {
    await ask();
  } catch (error) {
    found.errors.push([error.status, error.code, error.param]);
  }
}
console.log(JSON.stringify(found));
