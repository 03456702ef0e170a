/** The command line with a TAP interface: what it serves, shows and says, and how it fails. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, existsSync, mkdtempSync, openSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { findInterface } from "../../native/network-interface.ts";
import { openTap } from "../../native/tun.ts";
import { PacketSocket, numbered } from "../datapath/tap-packets.ts";
import { enterNetwork, interfaces, ip, until } from "../datapath/tap-stage.ts";
import { Vm } from "../datapath/tap-vm.ts";

const skipped = enterNetwork();
let directory: string;
let open: DisposableStack;

beforeEach((context) => {
  if (skipped !== undefined) context.skip(skipped);
  directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
  open = new DisposableStack();
});

afterEach(() => {
  if (skipped !== undefined) return;
  open.dispose();
  rmSync(directory, { recursive: true });
  for (const name of interfaces()) if (name !== "lo") ip("link", "del", name);
});

const path = (name: string): string => join(directory, name);

interface Running {
  child: ChildProcess;
  output: { stdout: string; stderr: string };
  exit: Promise<{ status: number | null; signal: string | null }>;
}

/** @param fds open files that it gets as fds 3, 4, ... */
function cli(args: readonly string[], { fds = [] }: { fds?: number[] } = {}): Running {
  const child = spawn(process.execPath, ["src/cli/main.ts", ...args], {
    stdio: ["ignore", "pipe", "pipe", ...fds],
  });
  open.defer(() => child.kill("SIGKILL"));
  const output = { stdout: "", stderr: "" };
  child.stdout?.setEncoding("utf8").on("data", (text: string) => (output.stdout += text));
  child.stderr?.setEncoding("utf8").on("data", (text: string) => (output.stderr += text));
  const exit = once(child, "close").then(([status, signal]) => ({ status, signal }));
  return { child, output, exit };
}

/** A relay between a VM at the socket "vm" and an interface, once it serves. */
async function serve(tap: string, fds: number[] = []): Promise<Running> {
  const running = cli(["run", "--link", `vhost-user:${path("vm")}=${tap}`, "--control", path("control")], { fds });
  let ended = false;
  void running.exit.then(() => (ended = true));
  await until("it serves, or has ended", () => ended || existsSync(path("control")));
  expect(running.output.stderr).not.toMatch(/error/i);
  return running;
}

async function show(...options: string[]): Promise<string> {
  const { output, exit } = cli(["show", ...options, "--control", path("control")]);
  expect(await exit).toEqual({ status: 0, signal: null });
  return output.stdout;
}

/** One frame each way. */
async function expectCarries(vm: Vm, name: string): Promise<void> {
  using network = new PacketSocket(name);
  vm.supply();
  vm.send(numbered(1, 100));
  network.send(numbered(2, 200));
  await until("it is out", () => network.receive()?.frame.equals(numbered(1, 100)) === true);
  await until("it has arrived", () => vm.receive().some(({ frame }) => frame.equals(numbered(2, 200))));
}

describe("run", () => {
  it("serves a VM and an interface of its own, shows them, tells what happens; SIGTERM leaves nothing behind", async () => {
    const tap = "tap:tap0,mtu=2000";
    const { child, output, exit } = await serve(tap);
    using vm = await Vm.connect(path("vm"), {});
    await expectCarries(vm, "tap0");
    const told = /^vhost-relay: tap:tap0,mtu=2000: interface tap0 is reached by (io_uring|aio|rw)/m.exec(output.stderr);
    const method = told?.[1];
    expect(method).toBeTypeOf("string");

    const [{ state }] = JSON.parse(await show("-j"));
    expect(state.links[0].ports).toMatchObject([
      { port: `vhost-user:${path("vm")}`, state: "running", mtu: null },
      { port: tap, state: "up", mtu: 2000, interface: { name: "tap0", method } },
    ]);
    const lanes = state.links[0].lanes as { name: string }[];
    expect(lanes.toSorted((a, b) => a.name.localeCompare(b.name))).toMatchObject([
      { name: "link0/a0", from: `vhost-user:${path("vm")}`, to: tap, packets: 1, bytes: 100, running: true },
      { name: "link0/b0", from: tap, to: `vhost-user:${path("vm")}`, packets: 1, bytes: 200, running: true },
    ]);
    const text = await show();
    expect(text).toContain(`vhost-user:${path("vm")} (running)  <->  ${tap} (up, mtu 2000, tap0 by ${method})`);
    expect(text).toMatch(/link0\/a0 +1 +100 /);
    expect(text).toMatch(/link0\/b0 +1 +200 /);

    ip("link", "set", "tap0", "down");
    await until("it is told", () =>
      /interface tap0 is down and carries nothing; ip link set dev tap0 up/.test(output.stderr),
    );
    expect(await show()).toContain(`${tap} (down, mtu 2000, tap0 by ${method})`);
    vm.send(numbered(3, 100));
    await until("it is dropped", () => vm.unsent() === 0);
    expect(await show()).toContain("link0/a0 dropped: noReceiver 1");
    ip("link", "set", "tap0", "mtu", "3000", "up");
    await until("it is told", () => /an MTU of 3000 bytes now/.test(output.stderr));
    await expectCarries(vm, "tap0");
    ip("link", "del", "tap0");
    await until("it is told", () => /interface tap0 was deleted; nothing is carried any more/.test(output.stderr));
    expect(await show()).toContain(`${tap} (gone,`);
    for (const line of output.stderr.trim().split("\n")) expect(line).toMatch(/^vhost-relay: [^ ]+: /);

    child.kill("SIGTERM");
    expect(await exit).toEqual({ status: 0, signal: null });
    expect(interfaces()).toEqual(["lo"]);
  });

  it("tap:new, joined to a bridge; killed, it leaves no interface, and the next one starts", async () => {
    ip("link", "add", "br0", "type", "bridge");
    for (let life = 0; life < 2; life++) {
      const { child, exit } = await serve("tap:new,bridge=br0");
      expect(findInterface("tap0")).toMatchObject({ isUp: true, master: findInterface("br0")!.index });
      const vm = await Vm.connect(path("vm"), {});
      vm.send(numbered(1, 100));
      child.kill("SIGKILL");
      await exit;
      // The kernel takes its time where requests had the interface.
      await until("the interface is gone", () => findInterface("tap0") === undefined);
      vm[Symbol.dispose]();
      rmSync(path("control"), { force: true });
    }
  });

  it("queues that it inherits", async () => {
    const { fds } = openTap("given", 2);
    const { child, exit } = await serve("tap:fd=3,fd=4", fds);
    fds.forEach(close);
    using vm = await Vm.connect(path("vm"), {});
    await expectCarries(vm, "given");
    expect(await show()).toContain("tap:fd=3,fd=4 (up, mtu 1500, given by ");
    child.kill("SIGINT");
    expect(await exit).toEqual({ status: 0, signal: null });
    expect(interfaces()).toEqual(["lo"]);
  });

  it("--backend takes an interface as well", async () => {
    const args = ["--socket-path", path("vm"), "--backend", "tap:tap0", "--control", path("control")];
    const { child, exit } = cli(args);
    await until("it serves", () => existsSync(path("control")));
    using vm = await Vm.connect(path("vm"), {});
    await expectCarries(vm, "tap0");
    child.kill("SIGTERM");
    expect(await exit).toEqual({ status: 0, signal: null });
  });
});

describe("fails with one line and", () => {
  async function expectFails(tap: string, status: number, message: RegExp, how: Parameters<typeof cli>[1] = {}) {
    const before = interfaces();
    const { output, exit } = cli(
      ["run", "--link", `vhost-user:${path("vm")}=${tap}`, "--control", path("control")],
      how,
    );
    expect(await exit).toEqual({ status, signal: null });
    const lines = output.stderr.trim().split("\n");
    expect(lines.filter((line) => !/ is reached by /.test(line))).toEqual([expect.stringMatching(message)]);
    expect(lines.every((line) => line.startsWith("vhost-relay: "))).toBe(true);
    expect(interfaces()).toEqual(before);
    expect(existsSync(path("vm"))).toBe(false);
  }

  it.each([
    ["tap:tap0,bridge=br7", 2, /bridge=br7: there is no such interface; "ip link add br7 type bridge"/],
    ["tap:fd=77", 2, /fd 77 is not open; was it passed on to this process\?/],
    ["tap:tap0,mtu=65535", 1, /setting up tap0 .*mtu 65535.*EINVAL/],
  ])("%s: status %i", expectFails);

  it("an interface that another program has: status 1", async () => {
    const { fds } = openTap("taken", 1);
    open.defer(() => fds.forEach(close));
    await expectFails("tap:taken", 1, /queue of taken; another program has it open: .*EBUSY/);
  });

  it("a file that is no queue: status 2", async () => {
    const file = openSync("/dev/null", "r+");
    open.defer(() => closeSync(file));
    await expectFails("tap:fd=3", 2, /fd 3 is no TAP interface; pass one that was opened from \/dev\/net\/tun/, {
      fds: [file],
    });
  });
});
