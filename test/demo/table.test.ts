/** The demo's live view: what goes to a terminal and what to a file. */
import { expect, test } from "vitest";
import { LiveTable, summary } from "../../src/demo/table.ts";

const at = (elapsedMs: number, received: number, drops = 0) => ({
  elapsedMs,
  directions: [
    { name: "a -> b", sent: received, received, receivedBytes: received * 1000, drops },
    { name: "b -> a", sent: 0, received: 0, receivedBytes: 0, drops: 0 },
  ],
});

function show(isTTY: boolean, environment: NodeJS.ProcessEnv): string[] {
  const written: string[] = [];
  const table = new LiveTable({ isTTY, write: (text) => written.push(text) }, environment);
  table.update(at(1000, 500_000));
  table.update(at(1500, 1_000_000, 3));
  return written;
}

test("elsewhere than on a terminal: a plain line a call, rates since the last one", () => {
  expect(show(false, {})).toEqual([
    "1.0 s  a -> b 500,000 packets/s 4.00 Gbit/s 0 drops 500,000 verified  |  b -> a 0 packets/s 0.00 Gbit/s 0 drops 0 verified\n",
    "1.5 s  a -> b 1,000,000 packets/s 8.00 Gbit/s 3 drops 1,000,000 verified  |  b -> a 0 packets/s 0.00 Gbit/s 0 drops 0 verified\n",
  ]);
});

test("on a terminal the table is drawn over itself", () => {
  const [first, second] = show(true, {});
  expect(first?.startsWith("\x1b[2K")).toBe(true);
  expect(second?.startsWith("\x1b[3A\x1b[2K")).toBe(true);
  expect(second?.split("\n")).toHaveLength(4);
});

test("colour only on a terminal and without NO_COLOR", () => {
  const colour = /\[\d+m/;
  expect(show(true, {}).join("")).toMatch(colour);
  expect(show(true, { NO_COLOR: "1" }).join("")).not.toMatch(colour);
  expect(show(false, {}).join("")).not.toMatch(colour);
});

test("the summary names sent, verified and dropped frames of each direction", () => {
  expect(summary(at(2000, 1_000_000, 3)).split("\n")[0]).toBe(
    "a -> b: 1,000,000 frames sent, 1,000,000 received and verified, 3 dropped; 500,000 packets/s, 4.00 Gbit/s",
  );
});
