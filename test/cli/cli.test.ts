/** The command line as its users run it: a process of its own. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { listen, socketpair } from "../../native/socket.ts";
import { Guest } from "../../src/driver/guest.ts";
import { NetDriver } from "../../src/driver/net.ts";
import { Frontend } from "../../src/vhost-user/frontend.ts";
import { exchange } from "../datapath/traffic.ts";

let directory: string;
const children: ChildProcess[] = [];

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
});

afterEach(() => {
  for (const child of children.splice(0)) child.kill("SIGKILL");
  rmSync(directory, { recursive: true });
});

interface Running {
  child: ChildProcess;
  output: { stdout: string; stderr: string };
  exit: Promise<{ status: number | null; signal: string | null }>;
}

function start(file: string, ...args: string[]): Running {
  return watch(spawn(process.execPath, [file, ...args], { stdio: ["ignore", "pipe", "pipe"] }));
}

/** Runs the command line with open files as fds 3, 4, ... */
function startWith(fds: number[], ...args: string[]): Running {
  return watch(spawn(process.execPath, ["src/cli/main.ts", ...args], { stdio: ["ignore", "pipe", "pipe", ...fds] }));
}

function watch(child: ChildProcess): Running {
  children.push(child);
  const output = { stdout: "", stderr: "" };
  child.stdout?.setEncoding("utf8").on("data", (text: string) => (output.stdout += text));
  child.stderr?.setEncoding("utf8").on("data", (text: string) => (output.stderr += text));
  const exit = once(child, "close").then(([status, signal]) => ({ status, signal }));
  return { child, output, exit };
}

const cli = (...args: string[]): Running => start("src/cli/main.ts", ...args);
const socket = (name: string): string => join(directory, name);
const present = (...names: string[]) =>
  expect.poll(() => names.map((name) => existsSync(socket(name))), { timeout: 20_000 });

describe("--print-capabilities", () => {
  it("says what this is, whatever else is asked for", async () => {
    const { output, exit } = cli("run", "--socket-path", "/nowhere", "--fd=3", "--print-capabilities");
    expect(await exit).toMatchObject({ status: 0 });
    expect(JSON.parse(output.stdout)).toEqual({ type: "net" });
  });
});

describe("wrong usage exits with 2 and says what would be right", () => {
  it.each([
    [["run"], /nothing to serve/],
    [["run", "--link", "vhost-user:/a"], /write two ports joined by "="/],
    [["run", "--link", "loopback=null"], /neither end can send/],
    [["run", "--link", "vhost-user:/a=pci:x"], /write two ports|unknown kind/],
    [["run", "--link", "vhost-user:/a=vhost-user:/a"], /named twice/],
    [["run", "--socket-path", "/a"], /belong together/],
    [["run", "--fd", "3"], /belong together/],
    [["run", "--fd", "3", "--socket-path", "/a", "--backend", "null"], /exclude each other/],
    [["run", "--fd", "three", "--backend", "null"], /descriptor number/],
    [["run", "--fd", "99", "--backend", "loopback"], /fd 99 is no unix stream socket/],
    [["run", "--link", "vhost-user:fd=3=vhost-user:fd=3"], /fd 3 is named twice/],
    [["run", "--poll", "never", "--link", "x=y"], /adaptive, busy, interrupt/],
    [["run", "--cpus", "one"], /commas/],
    [["run", "--stall-ms", "-1"], /milliseconds/],
    [["fly"], /too many arguments|unknown command/],
  ])("%j", async (args, message) => {
    const { output, exit } = cli(...args);
    expect(await exit).toMatchObject({ status: 2 });
    expect(output.stderr).toMatch(message);
  });
});

describe("run", () => {
  it("serves two virtual machines, shows them, and leaves nothing behind on SIGTERM", async () => {
    const link = `vhost-user:${socket("a.sock")},queues=2=vhost-user:${socket("b.sock")}`;
    const { child, exit, output } = cli("run", "--link", link, "--control", socket("control"));
    await present("a.sock", "b.sock", "control").toEqual([true, true, true]);
    using guests = new DisposableStack();
    const connect = async (path: string) =>
      guests.use(await NetDriver.connect({ path, guest: guests.use(new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }])) }));
    const a = await connect(socket("a.sock"));
    const b = await connect(socket("b.sock"));
    await exchange(a, b, 100);

    const json = cli("show", "-j", "--control", socket("control"));
    expect(await json.exit).toMatchObject({ status: 0 });
    const [relay] = JSON.parse(json.output.stdout);
    expect(relay.state.links[0].ports.map(({ state }: { state: string }) => state)).toEqual(["running", "running"]);
    expect(relay.state.links[0].lanes.map(({ packets }: { packets: number }) => packets).toSorted()).toEqual([0, 100]);
    const table = cli("show", "--control", socket("control"));
    await table.exit;
    expect(table.output.stdout).toMatch(/link0\/a0 +100/);

    child.kill("SIGTERM");
    expect(await exit).toEqual({ status: 0, signal: null });
    await present("a.sock", "b.sock", "control").toEqual([false, false, false]);
    expect(output.stderr).toMatch(/front-end connected/);
  });

  it("--socket-path with --backend is one link", async () => {
    const { child, exit } = cli("--socket-path", socket("vm"), "--backend", "loopback", "--control", socket("control"));
    await present("vm").toEqual([true]);
    using guest = new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]);
    using vm = await NetDriver.connect({ path: socket("vm"), guest });
    await exchange(vm, vm, 20);
    child.kill("SIGINT");
    expect(await exit).toEqual({ status: 0, signal: null });
  });

  it("--fd serves a listening socket that it inherits, one front-end after the other", async () => {
    const listener = listen(socket("vm"));
    const { child, exit } = startWith([listener], "--fd=3", "--backend=loopback", "--control", socket("control"));
    close(listener);
    for (let life = 0; life < 2; life++) {
      using guest = new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]);
      using vm = await NetDriver.connect({ path: socket("vm"), guest });
      await exchange(vm, vm, 20);
    }
    child.kill("SIGTERM");
    expect(await exit).toEqual({ status: 0, signal: null });
  });

  it("--fd serves a connected socket that it inherits, and ends when that front-end has left", async () => {
    const [ours, theirs] = socketpair();
    const { exit, output } = startWith([theirs], "--fd=3", "--backend=loopback", "--control", socket("control"));
    close(theirs);
    using frontend = new Frontend(ours);
    expect(await frontend.getFeatures()).toBeTypeOf("bigint");
    frontend[Symbol.dispose]();
    expect(await exit).toEqual({ status: 0, signal: null });
    expect(output.stderr).toMatch(/fd=3: its one connection is gone/);
  });

  it("fails early when a socket is served already", async () => {
    const first = cli("run", "--link", `vhost-user:${socket("a")}=null`, "--control", socket("control1"));
    await present("a").toEqual([true]);
    const second = cli("run", "--link", `vhost-user:${socket("a")}=null`, "--control", socket("control2"));
    expect((await second.exit).status).toBeGreaterThan(0);
    expect(second.output.stderr).toMatch(/already/);
    first.child.kill();
    await first.exit;
  });

  it("starts again on the same sockets after it was killed", async () => {
    const args = ["run", "--link", `vhost-user:${socket("a")}=null`, "--control", socket("control")];
    const first = cli(...args);
    await present("a", "control").toEqual([true, true]);
    first.child.kill("SIGKILL");
    await first.exit;
    const second = cli(...args);
    const shown = async () => (await cli("show", "--control", socket("control")).exit).status;
    await expect.poll(shown, { timeout: 20_000, interval: 500 }).toBe(0);
    second.child.kill();
    expect(await second.exit).toEqual({ status: 0, signal: null });
  });

  it("outlives the reader of its log", async () => {
    const { child, exit } = cli("run", "--link", `vhost-user:${socket("a")}=null`, "--control", socket("control"));
    await present("a").toEqual([true]);
    child.stderr?.destroy();
    for (let i = 0; i < 3; i++) {
      using guest = new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }]);
      using _driver = await NetDriver.connect({ path: socket("a"), guest });
    }
    child.kill("SIGTERM");
    expect(await exit).toEqual({ status: 0, signal: null });
  });

  it("ends when its code throws, though pollers sleep", async () => {
    const program = `
      import { Relay } from "./src/index.ts";
      await Relay.start({ links: [["vhost-user:${socket("a")}", "null"]] });
      throw new Error("of the program around the relay");`;
    const child = spawn(process.execPath, ["--input-type=module-typescript", "-e", program], { stdio: "ignore" });
    children.push(child);
    const [status] = await once(child, "close");
    expect(status).toBe(1);
  });

  it("serves on when the program's onEvent throws: that is an uncaught exception of the program", async () => {
    const program = `
      import { Relay } from "./src/index.ts";
      process.on("uncaughtException", (error) => console.log(error.message));
      await Relay.start({
        links: [["vhost-user:${socket("a")}", "null"]],
        onEvent: ({ type }) => { throw new Error("told of a " + type); },
      });`;
    const args = ["--input-type=module-typescript", "-e", program];
    const { child, output } = watch(spawn(process.execPath, args, { stdio: ["ignore", "pipe", "pipe"] }));
    await present("a").toEqual([true]);
    for (let life = 0; life < 2; life++) {
      using frontend = Frontend.connect(socket("a"));
      expect(await frontend.getFeatures()).toBeTypeOf("bigint");
    }
    const lines = ["told of a connect", "told of a disconnect"];
    await expect.poll(() => output.stdout, { timeout: 20_000 }).toBe(`${[...lines, ...lines].join("\n")}\n`);
    child.kill();
  });

  it("show says so when no relay answers", async () => {
    const { output, exit } = cli("show", "--control", socket("nobody"));
    expect(await exit).toMatchObject({ status: 1 });
    expect(output.stderr).toMatch(/no relay answers on .*nobody.*ENOENT/);
  });
});

describe("demo", () => {
  it("exchanges frames and verifies them; Ctrl-C ends it cleanly", async () => {
    const { child, output, exit } = cli("demo", "--forever");
    await expect.poll(() => output.stdout, { timeout: 20_000 }).toMatch(/[1-9][\d,]* verified/);
    child.kill("SIGINT");
    expect(await exit).toEqual({ status: 0, signal: null });
    expect(output.stdout).toMatch(/a -> b: ([\d,]+) frames sent, \1 received and verified/);
  });
});

describe("examples", () => {
  it("two-vms.ts joins two virtual machines", async () => {
    const { child, exit, output } = start("examples/two-vms.ts", socket("a"), socket("b"));
    await present("a", "b").toEqual([true, true]);
    using guests = new DisposableStack();
    const [a, b] = await Promise.all(
      ["a", "b"].map((name) =>
        NetDriver.connect({ path: socket(name), guest: guests.use(new Guest([{ gpa: 0n, sizeBytes: 64n << 20n }])) }),
      ),
    );
    guests.use(a!);
    guests.use(b!);
    await exchange(a!, b!, 50);
    await expect.poll(() => output.stdout, { timeout: 20_000 }).toMatch(/50 packets/);
    child.kill("SIGINT");
    expect(await exit).toEqual({ status: 0, signal: null });
  });
});
