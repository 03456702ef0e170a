/** The main job of `npm start`, as a user runs it: processes, signals, exit codes, files left behind. */
import { spawn } from "node:child_process";
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, expect, test } from "vitest";
import { exampleFrames } from "../../src/demo/frames.ts";
import { LINKTYPE_ETHERNET, writePcap } from "../../src/demo/pcap.ts";

const MAIN = fileURLToPath(new URL("../../src/cli/main.ts", import.meta.url));

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "demo-test-"));
});
afterEach(() => rmSync(directory, { recursive: true }));

/** Runs the demo with a temporary directory of its own. @param signal sent to it as soon as it shows progress */
async function demo(args: string[], signal?: NodeJS.Signals) {
  const child = spawn(process.execPath, [MAIN, "demo", ...args], { env: { ...process.env, TMPDIR: directory } });
  let output = "";
  let errors = "";
  child.stderr.on("data", (chunk: Buffer) => (errors += chunk.toString()));
  child.stdout.on("data", (chunk: Buffer) => (output += chunk.toString()));
  if (signal !== undefined) child.stdout.once("data", () => child.kill(signal));
  const status = await new Promise((resolve) => child.once("close", (code, signal) => resolve(code ?? signal)));
  const totals = [
    ...output.matchAll(/^\w -> \w: ([\d,]+) frames sent, ([\d,]+) received and verified, (\d+) dropped/gm),
  ];
  return {
    status,
    errors,
    totals: totals.map(([, ...counts]) => counts.map((count) => Number(count.replaceAll(",", "")))),
  };
}

test("it ends by itself: every frame sent in both directions arrived and was verified, nothing is left behind", async () => {
  const { status, errors, totals } = await demo(["--seconds", "1"]);
  expect({ status, errors }).toEqual({ status: 0, errors: "" });
  expect(totals).toHaveLength(2);
  for (const [sent, received, dropped] of totals) {
    expect(sent).toBeGreaterThan(0);
    expect([received, dropped]).toEqual([sent, 0]);
  }
  expect(readdirSync(directory)).toEqual([]);
});

test.each(["SIGINT", "SIGTERM"] as const)(
  "%s ends it at any time: summary, exit code 0, nothing left behind",
  async (signal) => {
    const { status, errors, totals } = await demo(["--forever"], signal);
    expect({ status, errors }).toEqual({ status: 0, errors: "" });
    for (const [sent, received] of totals) expect(received).toBe(sent);
    expect(totals).toHaveLength(2);
    expect(readdirSync(directory)).toEqual([]);
  },
);

test("--pcap replays the frames of a capture file", async () => {
  const packets = exampleFrames()
    .slice(0, 3)
    .map((data) => ({ timeNs: 0n, data, originalLength: data.length }));
  const file = join(directory, "three.pcap");
  writeFileSync(file, writePcap({ linkType: LINKTYPE_ETHERNET, packets }, { littleEndian: false }));
  const { status, errors } = await demo(["--seconds", "0.3", "--pcap", file]);
  expect({ status, errors }).toEqual({ status: 0, errors: "" });
});

test.each([
  ["a file that is not there", undefined],
  ["a file that is no capture", Buffer.alloc(100)],
  ["a capture of another link type", Buffer.from(writePcap({ linkType: 101, packets: [] }))],
  ["an empty capture", Buffer.from(writePcap({ linkType: LINKTYPE_ETHERNET, packets: [] }))],
])("--pcap with %s is a usage error: exit code 2, one line that says why", async (_, content) => {
  const file = join(directory, "x.pcap");
  if (content) writeFileSync(file, content);
  const { status, errors } = await demo(["--pcap", file]);
  expect(status).toBe(2);
  expect(errors).toMatch(/^vhost-relay: .*pcap.*\n$/);
});
