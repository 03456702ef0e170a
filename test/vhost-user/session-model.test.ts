/** BI-046: any message in any order. What must come of it is in session-model.ts, what is sent in session-commands.ts. */
import fc from "fast-check";
import { afterAll, describe, expect, it } from "vitest";
import { requests } from "../../src/vhost-user/requests.ts";
import { command, sequence } from "./session-commands.ts";
import type { Command } from "./session-commands.ts";
import { Model } from "./session-model.ts";
import { runSequence, SessionFds } from "./session-run.ts";

const fds = new SessionFds();
afterAll(() => fds[Symbol.dispose]());

describe("PROTOCOL, 4 and 5", () => {
  it("BI-046: sessions of random legal and illegal messages answer and act as the model says", async () => {
    await fc.assert(
      fc.asyncProperty(sequence, (commands) => runSequence(commands, fds)),
      { numRuns: 1500, seed: 46 },
    );
  });

  it("such sessions reach what there is to reach", () => {
    const seen = { started: 0, packed: 0, inflight: 0, together: 0, stopped: 0, refused: 0, dropped: 0 };
    for (const commands of fc.sample(sequence, { numRuns: 1500, seed: 46 })) observe(commands, seen);
    expect(Math.min(...Object.values(seen)), JSON.stringify(seen)).toBeGreaterThan(10);
  });

  it("every request of the protocol but SET_DEVICE_STATE_FD is sent, and unknown ones", () => {
    const sent = new Set(fc.sample(command, { numRuns: 20_000, seed: 46 }).map(({ request }) => request));
    expect([...requests.keys()].filter((id) => !sent.has(id))).toEqual([42]);
    expect(sent).toContain(0xffffffff);
  });
});

type Seen = Record<"started" | "packed" | "inflight" | "together" | "stopped" | "refused" | "dropped", number>;

/** What happened in a session, by the model. */
function observe(commands: Command[], seen: Seen): void {
  const model = new Model();
  for (const each of commands) {
    const before = model.device.rings.filter(Boolean).length;
    const expected = model.handle(each);
    const rings = model.device.rings.filter((ring) => ring !== undefined);
    if (rings.length > before) {
      seen.started++;
      if (model.isPacked) seen.packed++;
      if (rings.some(({ inflight }) => inflight !== undefined)) seen.inflight++;
      if (rings.length > 1) seen.together++;
    }
    if (rings.length < before) seen.stopped++;
    if (typeof expected === "object" && expected.payload.length === 8 && expected.payload[0] === 1) seen.refused++;
    if (expected === "drop") {
      seen.dropped++;
      return;
    }
  }
}
