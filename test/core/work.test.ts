/**
 * How long one poll may take: a driver whose chains are as long as the ring allows, and hold next to nothing, must not
 * hold up the other lanes of a poller (I6, BI-296, BI-297). Work is counted in guest accesses, for time says nothing on
 * a busy machine.
 */
import { describe, expect, test } from "vitest";
import { PIECES_MAX, POLL_COUNT } from "../../src/layout/lane.ts";
import { NEXT, WRITE } from "./raw-ring.ts";
import { DATA, Stage } from "./stage.ts";

const SIZE = 32_768;
/** Two words a descriptor, for a poll's limit of them, a frame's, and the chain that passes each; then ring entries. */
const ACCESSES_MAX = 2 * (2 * PIECES_MAX + 4 * SIZE) + 4 * SIZE;

/** Every head of the ring under attack leads to a chain of `size` descriptors; `last` makes them end or loop. */
function longChains(direction: "transmit" | "receive", last: { len: number; flags: number }): [Stage, () => number] {
  let accesses = 0;
  const stage = new Stage({ direction, size: SIZE }, { variant: "hooked", observe: () => void accesses++ });
  for (let i = 0; i < SIZE; i++) stage.ring.describe(i, { gpa: DATA, len: 0, flags: stage.flags | NEXT, next: i + 1 });
  stage.ring.describe(SIZE - 1, { gpa: DATA, next: 0, len: last.len, flags: stage.flags | last.flags });
  stage.ring.offer(...Array(SIZE).fill(0));
  return [stage, () => accesses];
}

describe("one poll reads a bounded number of descriptors", () => {
  test.each([
    ["loop", { len: 0, flags: NEXT }],
    ["end with one byte", { len: 1, flags: 0 }],
  ])("transmit chains of 32768 descriptors that %s: dropped, a few a poll", (_, last) => {
    const [stage, accesses] = longChains("transmit", last);
    const taken = stage.rig.core.poll(64, 0) & POLL_COUNT;
    expect(accesses()).toBeLessThan(ACCESSES_MAX);
    expect(taken).toBeGreaterThan(0);
    expect(stage.transmitq.used()).toEqual(Array.from({ length: taken }, () => ({ id: 0, len: 0 })));
  });

  test("receive chains of 32768 descriptors that loop: given back, a few a poll, until a good one comes", () => {
    const [stage, accesses] = longChains("receive", { len: 0, flags: NEXT });
    stage.send();
    for (let poll = 0; poll < 3; poll++) {
      const before = accesses();
      expect(stage.rig.poll()).toMatchObject({ taken: 0, waiting: true });
      expect(accesses() - before).toBeLessThan(ACCESSES_MAX);
      expect(stage.receiveq.used().length).toBeGreaterThan(0);
      expect(stage.rig.core.arm(0)).toBe(1); // there are more: do not sleep
    }
    stage.receiveq.describe(0, { gpa: DATA, len: 2048, flags: WRITE });
    expect(stage.rig.poll()).toMatchObject({ taken: 1, waiting: false });
    expect(stage.receiveq.used()).toEqual([{ id: 0, len: 112 }]);
  });

  test("receive chains of 32768 descriptors and one byte: no frame fits, each is dropped, the chains kept", () => {
    const [stage, accesses] = longChains("receive", { len: 1, flags: 0 });
    stage.send(1000);
    stage.transmitq.offer(...Array(9).fill(0));
    for (let dropped = 0; dropped < 4;) {
      const before = accesses();
      const { taken } = stage.rig.poll();
      expect(accesses() - before).toBeLessThan(ACCESSES_MAX);
      expect(taken).toBeGreaterThan(0);
      dropped += taken;
      expect(stage.rig.counters.drops.tooSmall).toBe(dropped);
    }
    expect(stage.receiveq.used()).toEqual([]);
  });
});
