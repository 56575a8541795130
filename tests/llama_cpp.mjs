// Prints, as JSON, the ids of a prompt and of the likeliest tokens after it, by llama.cpp: node llama_cpp.mjs MODEL PROMPT COUNT
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.FIRSTWORDS_NODE_MODULES}/`);
const { getLlama } = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const [modelPath, prompt, count] = process.argv.slice(2);

const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const types = { experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32" };
const context = await model.createContext({ contextSize: 256, flashAttention: false, ...types });
const ids = model.tokenize(prompt);
const said = [];
for await (const token of context.getSequence().evaluate(ids, { temperature: 0 })) {
  said.push(token);
  if (said.length === Number(count)) break;
}
console.log(JSON.stringify({ ids, said }));
process.exit(0);
