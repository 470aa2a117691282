// A bundle's mixed.onnx in JavaScript: each sample in the mode of its own task.
//
//     npm install onnxruntime-node
//     node examples/onnx_in_node.js digits/onnx/mixed.onnx < asked.json
//
// Reads {"shape": [batch, ...], "inputs": [numbers], "tasks": [IDs]}, inputs prepared as the network takes them, and
// prints {"shape": [batch, classes], "logits": [numbers]}, null for the columns that take no part.

const { readFileSync } = require("node:fs");
const ort = require("onnxruntime-node");

async function main() {
  const asked = JSON.parse(readFileSync(0, "utf8"));
  const session = await ort.InferenceSession.create(process.argv[2]);
  const found = await session.run({
    inputs: new ort.Tensor("float32", Float32Array.from(asked.inputs), asked.shape),
    tasks: new ort.Tensor("int64", BigInt64Array.from(asked.tasks, BigInt), [asked.tasks.length]),
  });
  const { dims, data } = found.logits;
  console.log(JSON.stringify({ shape: dims, logits: Array.from(data) }));
}

main();
