/** The product's lanes as carriers of the TAP bench: the core and a queue of requests, as the poller drives them. */
import { openRequestQueue } from "../native/request-queue.ts";
import type { RequestMethod } from "../native/request-queue.ts";
import { instantiateCore } from "../src/datapath/core.ts";
import { Lane } from "../src/datapath/lane.ts";
import { PackedDriver } from "../src/driver/packed.ts";
import { SplitDriver } from "../src/driver/split.ts";
import type { VirtqueueDriver } from "../src/driver/virtqueue.ts";
import {
  OFFLOAD_CSUM,
  OFFLOAD_TSO4,
  OFFLOAD_TSO6,
  POLL_COUNT,
  VRING_ENABLED,
  VRING_EVENT_IDX,
  VRING_INDIRECT,
  VRING_MERGEABLE,
  VRING_PACKED,
} from "../src/layout/lane.ts";
import { FRAME_BYTES_MAX } from "../src/layout/lane.ts";
import { NET_HDR_SIZE } from "../src/layout/virtio.ts";
import type { BenchTap } from "./c-tap.ts";
import type { LaidFrames, TapRig } from "./tap-rig.ts";
import type { Carrier, Direction } from "./tap-turns.ts";

const RING_SIZE = 1024;
const MERGED_BUFFER_BYTES = 4096;
/** A frame that does not fit its buffer is delivered in the turn after. */
const IDLE_TURNS_MAX = 2;
const OFFLOADS = OFFLOAD_CSUM | OFFLOAD_TSO4 | OFFLOAD_TSO6;

export interface LaneSetting {
  method: RequestMethod;
  direction: Direction;
  packed: boolean;
  /** Receive buffers of 4096 bytes, as many as a frame takes. Otherwise each frame has a buffer. */
  merged: boolean;
  /** Of one turn. */
  frames: number;
}

/** One lane between a ring of the rig and the TAP's queue. */
export class TapLane implements Disposable {
  readonly #tap: BenchTap;
  readonly #setting: LaneSetting;
  readonly #laid: LaidFrames;
  readonly #lane = new Lane("bench");
  readonly #driver: VirtqueueDriver;
  readonly #core: ReturnType<typeof instantiateCore>;
  readonly #queue: ReturnType<typeof openRequestQueue>["queue"];
  readonly #chains: number;

  /** @throws SystemError if the method does not work here */
  constructor(rig: TapRig, tap: BenchTap, laid: LaidFrames, setting: LaneSetting) {
    const { direction, packed, merged, frames, method } = setting;
    this.#tap = tap;
    this.#laid = laid;
    this.#setting = setting;
    const bytes = NET_HDR_SIZE + laid.frameBytes;
    const perFrame = merged ? Math.ceil(bytes / MERGED_BUFFER_BYTES) : 1;
    this.#chains = frames * perFrame;

    const Driver = packed ? PackedDriver : SplitDriver;
    const place = rig.take(Driver.layout(RING_SIZE, true).sizeBytes);
    const driver = new Driver({ ...place, size: RING_SIZE, eventIdx: true, indirect: true });
    driver.disableInterrupts();
    this.#driver = driver;
    const stride = merged ? MERGED_BUFFER_BYTES : laid.stride;
    const buffers = merged ? Math.floor(laid.sizeBytes / stride) : laid.buffers;
    const writable = direction === "receive";
    for (let i = 0; i < this.#chains; i++) {
      driver.add([{ gpa: laid.gpa + BigInt((i % buffers) * stride), len: writable ? stride : bytes, writable }]);
    }

    const memory = this.#lane.memory;
    const guestEnd = writable ? "destination" : "source";
    this.#lane.setExtents(guestEnd, rig.memory.extents);
    const locate = (gpa: bigint) => rig.memory.locate(gpa, 1n)!;
    const flags = VRING_ENABLED | VRING_EVENT_IDX | VRING_INDIRECT | VRING_MERGEABLE;
    this.#lane.setVring(guestEnd, {
      start: Symbol("start"),
      size: RING_SIZE,
      base: driver.base,
      desc: locate(driver.descGpa),
      avail: locate(driver.availGpa),
      used: locate(driver.usedGpa),
      headerBytes: NET_HDR_SIZE,
      offloads: OFFLOADS,
      flags: packed ? flags | VRING_PACKED : flags,
      kick: undefined,
      call: undefined,
      err: undefined,
    });
    this.#lane.setFile(writable ? "source" : "destination");
    // As for a guest that takes segments of 64 KiB: any buffer may be too small.
    this.#lane.setFileFrames(FRAME_BYTES_MAX);
    const { segments } = rig.memory;
    this.#lane.setBases(segments);
    this.#core = instantiateCore(memory, segments, segments);
    this.#queue = openRequestQueue({ memory, fd: tap.fd, direction }, [method]).queue;
  }

  /** @param budget frames handed to the kernel at once */
  carrier(budget: number): Carrier {
    const core = this.#core;
    const queue = this.#queue;
    const tap = this.#tap;
    const { frames, method } = this.#setting;
    return {
      name: `${method} ${budget}`,
      frames,
      prepare: () => this.#prepare(),
      carry() {
        const start = tap.threadNs();
        let idle = 0;
        for (let done = 0; done < frames;) {
          const requests = core.prepare(budget);
          if (requests !== 0) queue.submit(requests);
          const taken = core.finish() & POLL_COUNT;
          done += taken;
          idle = taken === 0 ? idle + 1 : 0;
          if (idle > IDLE_TURNS_MAX) throw new Error(`${method} carried ${done} frames of ${frames}`);
        }
        return tap.threadNs() - start;
      },
    };
  }

  [Symbol.dispose](): void {
    this.#queue.close();
  }

  /** The guest takes back what was used, and posts all of it. */
  #prepare(): void {
    const { direction, frames } = this.#setting;
    const recycled = this.#driver.recycle(RING_SIZE);
    const bytes = direction === "send" ? 0 : frames * (NET_HDR_SIZE + this.#laid.frameBytes);
    if (recycled !== 0 && (recycled !== this.#chains || this.#driver.usedLen !== bytes))
      throw new Error(`${recycled} chains with ${this.#driver.usedLen} bytes came back`);
    this.#driver.publish();
  }
}
