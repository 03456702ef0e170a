/** A thread in which system calls are refused: opens a queue of requests on a TAP, and sends batches of frames. */
import { parentPort, workerData } from "node:worker_threads";
import { baseAddress } from "../../native/mman.ts";
import { openRequestQueue } from "../../native/request-queue.ts";
import type { RefusedMethod, RequestMethod } from "../../native/request-queue.ts";
import { createLaneMemory } from "../../src/datapath/core.ts";
import { BOUNCES } from "../../src/layout/requests.ts";
import { Requests } from "./requests.ts";
import { refuseCalls } from "./seccomp.ts";
import type { Refusal } from "./seccomp.ts";
import { makeFrame, VNET_BYTES } from "./wire.ts";

export interface Task {
  fd: number;
  refusals: Refusal[];
  errno: number;
  /** Sizes of the batches; frames are numbered throughout. */
  batches: number[];
}

export interface Outcome {
  method: RequestMethod;
  refused: RefusedMethod[];
  /** For each batch the results of the completions it had. */
  results: number[][];
  /** Requests that the kernel took, all in all. */
  taken: number;
}

const { fd, refusals, errno, batches } = workerData as Task;
refuseCalls(refusals, errno);
const memory = createLaneMemory();
const { queue, refused } = openRequestQueue({ memory, fd, direction: "send" });
const requests = new Requests(memory);
const first = requests.next;
let sent = 0;
const results = batches.map((count) => {
  const stretches = Array.from({ length: count }, (_, i) => {
    const frame = makeFrame(sent++, 60);
    const at = BOUNCES + i * 128;
    const bytes = new Uint8Array(memory.buffer, at, VNET_BYTES + frame.length);
    bytes.fill(0);
    bytes.set(frame, VNET_BYTES);
    return { address: baseAddress(memory) + BigInt(at), length: bytes.length };
  });
  requests.write(stretches);
  queue.submit(count);
  return requests.reap().map(([, result]) => result);
});
const taken = requests.next - first;
queue.close();
parentPort?.postMessage({ method: queue.method, refused, results, taken } satisfies Outcome);
