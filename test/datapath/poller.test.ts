/** Pollers that cannot start or have ended: the relay says so, and leaves nothing behind. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { Pollers } from "../../src/datapath/poller.ts";
import { ConfigError } from "../../src/errors.ts";
import { Relay, type RelayEvent, type RelayOptions } from "../../src/index.ts";

let directory: string;
let path: string;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  path = join(directory, "vm.sock");
});
afterEach(() => rmSync(directory, { recursive: true }));

describe("Relay.start refuses", () => {
  it.each<Partial<RelayOptions>>([
    { cpus: [5000] },
    { cpus: [0, -1] },
    { cpus: [0.5] },
    { cpus: [Number.NaN] },
    // The highest number there can be: no machine that runs this has it.
    { cpus: [0, 1023] },
    { stallMs: -1 },
    { stallMs: 3_600_001 },
    { stallMs: Number.NaN },
    { stallMs: Number.POSITIVE_INFINITY },
  ])("%j", async (options) => {
    const events: RelayEvent[] = [];
    const links = [[`vhost-user:${path}`, "null"]] as const;
    const started = Relay.start({ links, ...options, onEvent: (event) => events.push(event) });
    await expect(started).rejects.toThrow(ConfigError);
    expect(events).toEqual([]);
    expect(existsSync(path)).toBe(false);
  });

  it.each([
    ["a CPU that there is not", 'links: [[port("a"), "null"]], cpus: [0, 1023]', ""],
    ["ports that do not fit into the address space", 'links: [[port("a"), port("b")]]', "ulimit -v 33000000; "],
  ])("%s: no thread keeps the process", async (_what, options, limit) => {
    const program = `
      import { Relay } from "./src/index.ts";
      const port = (name) => "vhost-user:${directory}/" + name;
      await Relay.start({ ${options} }).catch((error) => console.log(error.message));`;
    const node = `${limit}exec "$0" --input-type=module-typescript -e "$1"`;
    const child = spawn("sh", ["-c", node, process.execPath, program], { stdio: ["ignore", "pipe", "inherit"] });
    let output = "";
    child.stdout.setEncoding("utf8").on("data", (text: string) => (output += text));
    try {
      expect(await once(child, "close")).toEqual([0, null]);
    } finally {
      child.kill("SIGKILL");
    }
    expect(output).toMatch(limit ? /address space/ : /CPU 1023/);
  });
});

it("a poller that has ended runs no lane, and says so; parked they are all", async () => {
  const ignore = (): void => undefined;
  const pollers = new Pollers({ mode: "adaptive", cpus: [], pollers: 1, stallMs: 1000 }, ignore, ignore);
  await pollers.ready();
  const poller = pollers.next();
  await poller.park(0);
  await pollers.close();
  const nothing = { kick: undefined, call: undefined, err: undefined };
  const task = {
    lane: 0,
    name: "lane",
    memories: undefined,
    receiveq: { lane: 0, memory: undefined },
    source: nothing,
    destination: nothing,
    file: undefined,
  };
  await expect(poller.run(task)).rejects.toThrow(/ended/);
  await poller.park(0);
});
