/** The demo's frame sequence: what sender and receiver make of a number must agree, and any change must show. */
import { describe, expect, test } from "vitest";
import { FRAME_SIZE_MAX, FRAME_SIZE_MIN, Traffic } from "../../src/demo/traffic.ts";

const CAPTURED = [Uint8Array.from({ length: 60 }, (_, i) => i), Uint8Array.from({ length: 1514 }, (_, i) => i * 7)];
const traffic = (stream = 0) => new Traffic(CAPTURED, stream);

describe("frame k", () => {
  test("is the same wherever it is made, and whatever was made before", () => {
    const [sender, receiver] = [traffic(), traffic()];
    for (const k of [0, 1, 2, 3, 17_873, 17_875, 2 ** 32 + 1, 2 ** 53 - 1, 1]) {
      const frame = sender.frame(k).slice();
      receiver.frame(k + 7);
      expect(receiver.difference(k, frame), `frame ${k}`).toBeUndefined();
    }
  });

  test("even frames replay the captured ones in turn", () => {
    const frames = [0, 2, 4, 6].map((k) => traffic().frame(k));
    expect(frames).toEqual([CAPTURED[0], CAPTURED[1], CAPTURED[0], CAPTURED[1]]);
  });

  test("odd frames visit every size from 64 to 9000 once, then again", () => {
    const sizes = FRAME_SIZE_MAX - FRAME_SIZE_MIN + 1;
    const sender = traffic();
    const seen = new Set(Array.from({ length: sizes }, (_, turn) => sender.frame(2 * turn + 1).length));
    expect([seen.size, Math.min(...seen), Math.max(...seen)]).toEqual([sizes, FRAME_SIZE_MIN, FRAME_SIZE_MAX]);
    expect(sender.frame(2 * sizes + 1).length).toBe(sender.frame(1).length);
  });

  test("two frames of one size differ, and so do the same frames of two streams", () => {
    const sizes = FRAME_SIZE_MAX - FRAME_SIZE_MIN + 1;
    const first = traffic().frame(1).slice();
    expect(traffic().frame(2 * sizes + 1)).not.toEqual(first);
    expect(traffic(1).frame(1)).not.toEqual(first);
    expect(traffic(1).frame(1).subarray(22)).not.toEqual(first.subarray(22));
  });
});

describe("difference() finds", () => {
  test("a changed byte, and names it", () => {
    const frame = traffic().frame(1).slice();
    frame[50]! ^= 0x10;
    expect(traffic().difference(1, frame)).toMatch(/^frame 1 of 64 bytes differs at byte 50: /);
  });

  test("a frame cut short or grown", () => {
    expect(traffic().difference(2, CAPTURED[1]!.subarray(1))).toMatch(/has 1513 bytes instead of 1514/);
    expect(traffic().difference(0, CAPTURED[1]!)).toMatch(/has 1514 bytes instead of 60/);
  });

  test("a frame lost, repeated or out of order", () => {
    expect(traffic().difference(1, traffic().frame(3))).toBeDefined();
    expect(traffic().difference(5, traffic().frame(3))).toBeDefined();
  });
});
