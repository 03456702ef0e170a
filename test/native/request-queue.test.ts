/** Requests to the kernel, in each of the three ways, on a TAP: native/request-queue.ts. */
import { closeSync, openSync } from "node:fs";
import { once } from "node:events";
import { Worker } from "node:worker_threads";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { baseAddress } from "../../native/mman.ts";
import { openRequestQueue } from "../../native/request-queue.ts";
import type { RequestMethod, RequestQueue } from "../../native/request-queue.ts";
import { SystemError } from "../../src/errors.ts";
import { createLaneMemory } from "../../src/datapath/core.ts";
import { COMPLETIONS, REQUEST_FORMAT, REQUESTS, REQUESTS_MAX } from "../../src/layout/requests.ts";
import { enterNewNetwork } from "./namespace.ts";
import type { Outcome, Task } from "./refused-thread.ts";
import { Requests } from "./requests.ts";
import type { Stretch } from "./requests.ts";
import { makeFrame, openTap, VNET_BYTES, Wire } from "./wire.ts";

const EPERM = 1;
const EAGAIN = 11;
const EFAULT = 14;
const SYS_io_uring_setup = 425;
const SYS_io_uring_enter = 426;
const [SYS_io_setup, SYS_io_submit] = process.arch === "arm64" ? [0, 2] : [206, 209];

/** Nothing is mapped there: below vm.mmap_min_addr, and the kernel's half. */
const BAD_ADDRESSES = [16n, 0xffff_8000_0000_0000n];
/** The guests' buffers, and what is in them before. */
const GUARD = 0xee;
const guest = new WebAssembly.Memory({ initial: 64, maximum: 64, shared: true });
const guestBytes = new Uint8Array(guest.buffer);

const skipped = enterNewNetwork();
let wire: Wire;

beforeEach(() => {
  if (skipped !== undefined) return;
  wire = new Wire("wire");
  guestBytes.fill(GUARD);
});
afterEach(() => {
  if (skipped === undefined) wire[Symbol.dispose]();
});

/** Why a method cannot be tested here, or undefined. @throws Error under CI */
function missing(method: RequestMethod): string | undefined {
  if (skipped !== undefined) return skipped;
  const tap = openTap("probe");
  try {
    openRequestQueue({ memory: createLaneMemory(), fd: tap, direction: "send" }, [method]).queue.close();
    return undefined;
  } catch (error) {
    if (process.env["CI"] === "true") throw error;
    return (error as Error).message;
  } finally {
    closeSync(tap);
  }
}

/** One end of the wire, as a lane has it. */
class End implements Disposable {
  readonly queue: RequestQueue;
  readonly requests: Requests;
  readonly memory = createLaneMemory();

  constructor(method: RequestMethod, direction: "send" | "receive") {
    this.queue = openRequestQueue({ memory: this.memory, fd: wire.tap, direction }, [method]).queue;
    this.requests = new Requests(this.memory);
  }

  /** Hands over requests, all of which the kernel takes. @returns their results */
  run(wanted: Parameters<Requests["write"]>[0]): number[] {
    const slots = this.requests.write(wanted);
    this.queue.submit(wanted.length);
    const results = new Map(this.requests.reap());
    expect([...results.keys()].toSorted((a, b) => a - b)).toEqual(slots.toSorted((a, b) => a - b));
    return slots.map((slot) => results.get(slot)!);
  }

  [Symbol.dispose](): void {
    this.queue.close();
  }
}

/** Stretches of the guest's memory, some bytes apart from each other. */
function layOut(lengths: readonly number[], at: number): Stretch[] {
  return lengths.map((length) => {
    const stretch = { address: baseAddress(guest) + BigInt(at), length };
    at += length + 5;
    return stretch;
  });
}

function bytesOf({ address, length }: Stretch): Uint8Array {
  return guestBytes.subarray(Number(address - baseAddress(guest)), Number(address - baseAddress(guest)) + length);
}

/** Puts a frame behind an empty vnet header into stretches. */
function scatter(frame: Uint8Array, stretches: readonly Stretch[]): void {
  const bytes = Buffer.concat([Buffer.alloc(VNET_BYTES), frame]);
  let done = 0;
  for (const stretch of stretches) {
    bytesOf(stretch).set(bytes.subarray(done, done + stretch.length));
    done += stretch.length;
  }
  expect(done).toBe(bytes.length);
}

/** What is in stretches, as far as the frame goes; behind it the guard. */
function gather(stretches: readonly Stretch[], length: number): Buffer {
  const bytes = Buffer.concat(stretches.map(bytesOf));
  expect(bytes.subarray(length).every((byte) => byte === GUARD)).toBe(true);
  return bytes.subarray(VNET_BYTES, length);
}

/** A length cut into pieces, the last one takes the rest. */
function cut(length: number, ...pieces: number[]): number[] {
  return [...pieces, length - pieces.reduce((sum, piece) => sum + piece, 0)];
}

describe.skipIf(skipped !== undefined)(`requests to the kernel${skipped ? `: ${skipped}` : ""}`, () => {
  describe.each(["io_uring", "aio", "rw"] as const)("%s", (method) => {
    const reason = missing(method);
    const works = it.skipIf(reason !== undefined);
    const after = reason ? `: ${reason}` : "";

    works(`sends frames of one stretch or several, in order${after}`, () => {
      using end = new End(method, "send");
      const frames = [60, 61, 64, 300, 1000, 1513, 1514].map((length, i) => makeFrame(i, length));
      const chains = frames.map((frame, i) => {
        const length = VNET_BYTES + frame.length;
        const pieces = [[length], cut(length, VNET_BYTES), cut(length, 3, 20, 31), cut(length, 1)][i % 4]!;
        const stretches = layOut(pieces, i * 4096 + 7 * i);
        scatter(frame, stretches);
        return stretches.length === 1 ? stretches[0]! : stretches;
      });
      expect(end.run(chains)).toEqual(frames.map((frame) => VNET_BYTES + frame.length));
      for (const frame of frames) expect(wire.receive()).toEqual(frame);
      expect(wire.receive()).toBeUndefined();
    });

    works(`receives frames into one stretch or several, in order${after}`, () => {
      using end = new End(method, "receive");
      const frames = [60, 61, 64, 300, 1000, 1513, 1514].map((length, i) => makeFrame(i, length));
      for (const frame of frames) wire.send(frame);
      const chains = frames.map((_, i) =>
        layOut([[2048], [VNET_BYTES, 1600], [5, 40, 1, 1500], [10, 2000]][i % 4]!, i * 4096 + 7 * i),
      );
      const results = end.run(chains.map((chain) => (chain.length === 1 ? chain[0]! : chain)));
      expect(results).toEqual(frames.map((frame) => VNET_BYTES + frame.length));
      expect(chains.map((chain, i) => gather(chain, results[i]!))).toEqual(frames);
    });

    works(`both directions at once on one fd, each with a memory of its own${after}`, () => {
      using send = new End(method, "send");
      using receive = new End(method, "receive");
      for (let i = 0; i < 3; i++) {
        const [there, back] = layOut([VNET_BYTES + 100, 2048], i * 8192) as [Stretch, Stretch];
        scatter(makeFrame(i, 100), [there]);
        wire.send(makeFrame(i + 100, 200));
        expect(send.run([there])).toEqual([VNET_BYTES + 100]);
        expect(receive.run([back])).toEqual([VNET_BYTES + 200]);
        expect(wire.receive()).toEqual(makeFrame(i, 100));
        expect(gather([back], VNET_BYTES + 200)).toEqual(makeFrame(i + 100, 200));
      }
    });

    works(`an empty queue gives EAGAIN, and frames that come later are received${after}`, () => {
      using end = new End(method, "receive");
      const chains = layOut([2048, 2048, 2048, 2048], 0);
      for (let round = 0; round < 3; round++) {
        for (let i = 0; i < 2; i++) wire.send(makeFrame(2 * round + i, 60));
        const first = end.requests.next;
        end.requests.write(chains);
        end.queue.submit(4);
        const results = end.requests.reap().map(([, result]) => result);
        // read(2) is not called again; the others have been told to
        expect(results).toEqual([72, 72, -EAGAIN, -EAGAIN].slice(0, method === "rw" ? 3 : 4));
        expect(end.requests.next).toBe(first + results.length);
        chains.slice(0, 2).forEach((chain, i) => expect(gather([chain], 72)).toEqual(makeFrame(2 * round + i, 60)));
        guestBytes.fill(GUARD);
      }
      expect(end.requests.write([chains[0]!])).toHaveLength(1);
      end.queue.submit(1);
      expect(end.requests.reap().map(([, result]) => result)).toEqual([-EAGAIN]);
    });

    works(`batches go round the slots, and through the ring of completions${after}`, () => {
      using send = new End(method, "send");
      using receive = new End(method, "receive");
      for (const [batch, count] of [40, 40, 64, 1, 63, 64, 40, 7].entries()) {
        const chains = layOut(Array<number>(count).fill(VNET_BYTES + 60), 0);
        const frames = chains.map((chain, i) => {
          const frame = makeFrame(100 * batch + i, 60);
          scatter(frame, [chain]);
          return frame;
        });
        expect(send.run(chains)).toEqual(chains.map(() => VNET_BYTES + 60));
        for (const frame of frames) {
          expect(wire.receive()).toEqual(frame);
          wire.send(frame);
        }
        guestBytes.fill(GUARD);
        const buffers = layOut(Array<number>(count).fill(128), 0);
        const results = receive.run(buffers);
        expect(buffers.map((buffer, i) => gather([buffer], results[i]!))).toEqual(frames);
      }
    });

    works(`all iovecs there are: 64 for each of 64 requests${after}`, () => {
      using send = new End(method, "send");
      using receive = new End(method, "receive");
      const pieces = cut(VNET_BYTES + 512, ...Array<number>(63).fill(8));
      const chains = Array.from({ length: REQUESTS_MAX }, (_, i) => layOut(pieces, i * 4096));
      const frames = chains.map((chain, i) => {
        const frame = makeFrame(i, 512);
        scatter(frame, chain);
        return frame;
      });
      const all = chains.map(() => VNET_BYTES + 512);
      expect(send.run(chains)).toEqual(all);
      for (const frame of frames) {
        expect(wire.receive()).toEqual(frame);
        wire.send(frame);
      }
      guestBytes.fill(GUARD);
      expect(receive.run(chains)).toEqual(all);
      expect(chains.map((chain) => gather(chain, VNET_BYTES + 512))).toEqual(frames);
      // nothing between the pieces
      expect(guestBytes[8]).toBe(GUARD);
    });

    works(`a bad address is that request's failure alone${after}`, () => {
      using end = new End(method, "send");
      const good = layOut([72, 72, 72], 0);
      good.forEach((stretch, i) => scatter(makeFrame(i, 60), [stretch]));
      for (const bad of BAD_ADDRESSES) {
        const results = end.run([
          { address: bad, length: 72 },
          good[0]!,
          { iovecs: bad, count: 2 },
          good[1]!,
          [{ address: bad, length: 72 }],
          [
            { address: good[2]!.address, length: 12 },
            { address: bad, length: 60 },
          ],
          good[2]!,
        ]);
        expect(results).toEqual([-EFAULT, 72, -EFAULT, 72, -EFAULT, -EFAULT, 72]);
        for (let i = 0; i < 3; i++) expect(wire.receive()).toEqual(makeFrame(i, 60));
        expect(wire.receive()).toBeUndefined();
      }
    });

    works(`a bad address for what is received${after}`, () => {
      using end = new End(method, "receive");
      const [good] = layOut([128], 0) as [Stretch];
      for (const bad of BAD_ADDRESSES) {
        for (let i = 0; i < 3; i++) wire.send(makeFrame(i, 60));
        const results = end.run([{ iovecs: bad, count: 2 }, good, { address: bad, length: 128 }]);
        expect(results).toEqual([-EFAULT, 72, -EFAULT]);
        expect(gather([good], 72)).toEqual(makeFrame(0, 60));
        // The kernel may have taken a frame for the last one.
        while (end.run([good])[0]! > 0);
        guestBytes.fill(GUARD);
      }
    });

    works(`closed, it lets the file go at once, and memory 0 can be used for another${after}`, () => {
      const memory = createLaneMemory();
      const [frame] = layOut([72], 0) as [Stretch];
      scatter(makeFrame(1, 60), [frame]);
      for (let i = 0; i < 20; i++) {
        // A TAP of one queue: EBUSY if anybody else had it.
        const tap = openTap("other");
        const { queue } = openRequestQueue({ memory, fd: tap, direction: "receive" }, [method]);
        const requests = new Requests(memory);
        requests.write([frame]);
        queue.submit(1);
        expect(requests.reap()).toHaveLength(1);
        queue.close();
        closeSync(tap);
      }
    });

    works(`a fd that is none is refused${after}`, () => {
      const fd = openSync("/dev/null", "r");
      closeSync(fd);
      const target = { memory: createLaneMemory(), fd, direction: "receive" as const };
      expect(() => openRequestQueue(target, [method])).toThrow(/no way to reach fd .*EBADF/);
    });
  });

  it.each(["aio", "rw"] as const)("%s: the requests' number wraps at 2^32", (method) => {
    using end = new End(method, "send");
    const words = new DataView(end.memory.buffer);
    words.setUint32(words.getUint32(REQUEST_FORMAT + 20, true), 2 ** 32 - 5, true);
    const chains = layOut(Array<number>(9).fill(72), 0);
    chains.forEach((chain, i) => scatter(makeFrame(i, 60), [chain]));
    expect(end.run(chains)).toEqual(chains.map(() => 72));
    expect(end.requests.next).toBe(4);
    for (let i = 0; i < 9; i++) expect(wire.receive()).toEqual(makeFrame(i, 60));
  });

  it.skipIf(missing("io_uring") !== undefined)(
    "io_uring: what the kernel still has of memory 0 is not ours any more",
    () => {
      const end = new End("io_uring", "receive");
      end.queue.close();
      const pages = new Uint8Array(end.memory.buffer, REQUESTS, COMPLETIONS + 4096 - REQUESTS);
      expect(pages.every((byte) => byte === 0)).toBe(true);
    },
  );
});

describe.skipIf(skipped !== undefined)(`methods that are refused${skipped ? `: ${skipped}` : ""}`, () => {
  it("the first that works is taken, of those that are asked for", () => {
    const open = (methods: RequestMethod[]): RequestMethod => {
      const { queue } = openRequestQueue({ memory: createLaneMemory(), fd: wire.tap, direction: "send" }, methods);
      queue.close();
      return queue.method;
    };
    expect([open(["rw", "io_uring"]), open(["aio"])]).toEqual(["rw", "aio"]);
  });

  it("all refused: the error has each reason", () => {
    const target = { memory: createLaneMemory(), fd: -1, direction: "send" as const };
    expect(() => openRequestQueue(target)).toThrow(SystemError);
    expect(() => openRequestQueue(target)).toThrow(/io_uring: .*aio: .*EBADF.*rw: .*EBADF/);
  });

  it("forbidden by seccomp: the next one, and the reason is said", async () => {
    const refusals = [{ number: SYS_io_uring_setup }];
    const outcome = await inThread({ refusals, errno: EPERM, batches: [3] });
    expect(outcome).toMatchObject({ method: "aio", results: [[72, 72, 72]] });
    expect(outcome.refused).toEqual([
      { method: "io_uring", reason: expect.stringMatching(/kernel.io_uring_disabled.*seccomp.*EPERM/) as string },
    ]);
    expect(received()).toEqual([0, 1, 2]);
  });

  it("both forbidden, one of them only when it is used: read and write remain", async () => {
    const refusals = [{ number: SYS_io_uring_enter }, { number: SYS_io_setup }];
    const outcome = await inThread({ refusals, errno: EPERM, batches: [3, 64] });
    expect(outcome.method).toBe("rw");
    expect(outcome.refused.map(({ method }) => method)).toEqual(["io_uring", "aio"]);
    expect(received()).toHaveLength(67);
  });

  it.skipIf(missing("io_uring") !== undefined)(
    "io_uring: a batch that the kernel does not take leaves no trace",
    async () => {
      const refusals = [{ number: SYS_io_uring_enter, second: 7 }];
      const outcome = await inThread({ refusals, errno: EAGAIN, batches: [5, 7, 3, 7, 7, 60] });
      expect(outcome.method).toBe("io_uring");
      expect(outcome.results.map((results) => results.length)).toEqual([5, 0, 3, 0, 0, 60]);
      expect(outcome.taken).toBe(68);
      expect(outcome.results.flat().every((result) => result === 72)).toBe(true);
      expect(received()).toEqual([...numbers(0, 5), ...numbers(12, 3), ...numbers(29, 60)]);
    },
  );

  it("aio: a batch that the kernel does not take leaves no trace", async () => {
    const refusals = [{ number: SYS_io_uring_setup }, { number: SYS_io_submit as number, second: 7 }];
    const outcome = await inThread({ refusals, errno: EAGAIN, batches: [5, 7, 3, 7, 7, 60] });
    expect(outcome.method).toBe("aio");
    expect(outcome.results.map((results) => results.length)).toEqual([5, 0, 3, 0, 0, 60]);
    expect(outcome.taken).toBe(68);
    expect(received()).toEqual([...numbers(0, 5), ...numbers(12, 3), ...numbers(29, 60)]);
  });
});

/** Sends batches of frames in a thread in which system calls are refused. */
async function inThread(task: Omit<Task, "fd">): Promise<Outcome> {
  const thread = new Worker(new URL("refused-thread.ts", import.meta.url), {
    workerData: { ...task, fd: wire.tap } satisfies Task,
  });
  const [outcome] = (await once(thread, "message")) as [Outcome];
  await thread.terminate();
  return outcome;
}

/** The numbers of the frames that came, in order. */
function received(): number[] {
  const found: number[] = [];
  for (let frame = wire.receive(); frame; frame = wire.receive()) found.push(frame.readUInt16BE(14));
  return found;
}

function numbers(first: number, count: number): number[] {
  return Array.from({ length: count }, (_, i) => first + i);
}
