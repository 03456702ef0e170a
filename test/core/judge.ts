/** One poll of a rig beside one of the reference: result, counters and every byte of both guests must be equal. */
import { isDeepStrictEqual } from "node:util";
import { expect } from "vitest";
import { ReferenceLane } from "./reference.ts";
import { ReferenceRam } from "./reference-ram.ts";
import type { PollResult, Ram, Rig } from "./rig.ts";

export class Judge {
  readonly rig: Rig;
  readonly reference: ReferenceLane;

  constructor(rig: Rig) {
    this.rig = rig;
    this.reference = new ReferenceLane(rig.source.ring, rig.destination.ring);
  }

  poll(budget = 64, stuck = false): PollResult {
    return this.#compare(
      () => this.rig.poll(budget, stuck),
      (from, to) => this.reference.poll(from, to, budget, stuck),
    );
  }

  /** @returns whether there is work after all */
  arm(stuck = false): boolean {
    return this.#compare(
      () => this.rig.core.arm(stuck ? 1 : 0) !== 0,
      (from, to) => this.reference.arm(from, to, stuck),
    );
  }

  disarm(): void {
    this.#compare(
      () => this.rig.core.disarm(),
      (from, to) => this.reference.disarm(from, to),
    );
  }

  /** Stops a virtqueue and starts it where it stopped. */
  restart(end: "source" | "destination"): void {
    const base = this.rig.lane.nextAvail(end);
    expect(base).toBe(this.reference[end].next);
    this.rig.start(end, base);
    this.rig.core.refresh();
    this.reference.restart(end, base);
  }

  /** Starts both virtqueues anew where their rings say. */
  startAll(): void {
    for (const end of ["source", "destination"] as const) {
      this.rig.start(end);
      this.reference.restart(end, this.rig[end].ring.base);
    }
    this.rig.core.refresh();
  }

  #compare<T>(real: () => T, reference: (from: ReferenceRam, to: ReferenceRam) => T): T {
    const { source, destination } = this.rig;
    const [fromCopy, from] = copyOf(source.ram);
    const [toCopy, to] = source.ram === destination.ram ? [fromCopy, from] : copyOf(destination.ram);
    const expected = reference(from, to);
    const result = real();
    const counters = { ...this.reference.counters, kicks: 0 };
    // expect() says what differs, but takes its time
    if (!isDeepStrictEqual(result, expected)) expect(result).toEqual(expected);
    if (!isDeepStrictEqual(this.rig.counters, counters)) expect(this.rig.counters).toEqual(counters);
    expectEqual("source", source.ram, fromCopy);
    expectEqual("destination", destination.ram, toCopy);
    return result;
  }
}

function copyOf(ram: Ram): [bytes: Uint8Array, copy: ReferenceRam] {
  const bytes = Uint8Array.from(ram.bytes);
  const regions = ram.regions.map(({ gpa, sizeBytes, start }) => {
    return { gpa, bytes: bytes.subarray(start, start + sizeBytes) };
  });
  return [bytes, new ReferenceRam(regions)];
}

function expectEqual(which: string, ram: Ram, expected: Uint8Array): void {
  if (Buffer.compare(ram.bytes, expected) === 0) return;
  const at = expected.findIndex((byte, i) => byte !== ram.bytes[i]);
  const shown = (bytes: Uint8Array) => Buffer.from(bytes.subarray(at, at + 16)).toString("hex");
  const place = `${which} RAM from gpa 0x${ram.gpa(at).toString(16)}`;
  expect(`${place}: ${shown(ram.bytes)}`).toBe(`${place}: ${shown(expected)}`);
}
