/** A lane between two guests without sockets or pollers: what a bench runs its carriers on. */
import { Lane } from "../src/datapath/lane.ts";
import { Guest } from "../src/driver/guest.ts";
import type { Window } from "../src/driver/guest.ts";
import { VRING_ENABLED, VRING_EVENT_IDX, VRING_INDIRECT, VRING_MERGEABLE, VRING_PACKED } from "../src/layout/lane.ts";
import { NET_HDR_SIZE } from "../src/layout/virtio.ts";
import { GuestMemory } from "../src/memory/guest-memory.ts";
import { RING_SIZE, WINDOW_BYTES } from "./drivers.ts";
import type { Drivers, LaidRing } from "./drivers.ts";

const GPA = 0x4000_0000n;

interface End {
  memory: GuestMemory;
  window: Window;
  segments: readonly WebAssembly.Memory[];
}

export class Rig {
  readonly lane = new Lane("bench");
  readonly source: End = guestEnd();
  readonly destination: End = guestEnd();

  constructor() {
    this.lane.setExtents("source", this.source.memory.extents);
    this.lane.setExtents("destination", this.destination.memory.extents);
  }

  /** Starts both virtqueues as the drivers laid them. */
  start({ transmitq, receiveq }: Drivers["rings"]): void {
    this.lane.setVring("source", vring(this.source, transmitq));
    this.lane.setVring("destination", vring(this.destination, receiveq));
  }
}

function guestEnd(): End {
  const guest = new Guest([{ gpa: GPA, sizeBytes: BigInt(WINDOW_BYTES) }]);
  const memory = new GuestMemory();
  memory.setRegions(guest.regions);
  return { memory, window: guest.window(GPA, WINDOW_BYTES), segments: memory.segments };
}

function vring({ memory }: End, { descGpa, availGpa, usedGpa, base, packed }: LaidRing) {
  const locate = (gpa: bigint) => memory.locate(gpa, 1n)!;
  return {
    start: Symbol("start"),
    size: RING_SIZE,
    base,
    desc: locate(descGpa),
    avail: locate(availGpa),
    used: locate(usedGpa),
    headerBytes: NET_HDR_SIZE,
    flags: VRING_ENABLED | VRING_EVENT_IDX | VRING_INDIRECT | VRING_MERGEABLE | (packed ? VRING_PACKED : 0),
    kick: undefined,
    call: undefined,
    err: undefined,
  };
}
