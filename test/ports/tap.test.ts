/** The TAP port: the interface itself, in a network namespace of this file's own. */
import { execFileSync, spawn } from "node:child_process";
import { createSocket, type Socket } from "node:dgram";
import { once } from "node:events";
import { closeSync, fstatSync, openSync, readdirSync, readSync, writeFileSync } from "node:fs";
import { afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { pipe } from "../../native/fd.ts";
import { findInterface } from "../../native/network-interface.ts";
import { adoptTap, openTap, setAttached } from "../../native/tun.ts";
import { ConfigError, SystemError } from "../../src/errors.ts";
import { NET_HDR_FLAGS, NET_HDR_SIZE, VIRTIO_NET_HDR_F_NEEDS_CSUM } from "../../src/layout/virtio.ts";
import { parsePort, type TapSpec } from "../../src/ports/spec.ts";
import { TapPort, type TapEvent } from "../../src/ports/tap.ts";
import { missingTools } from "../guests/tools.ts";
import { enterNewNetwork } from "../native/namespace.ts";

const NOBODY = 65_534;
const HOST = "10.9.0.1";
const GUEST = "10.9.0.2";
const GUEST_MAC = "52:54:00:00:00:02";
const PORT = 4000;
const ALL = (): boolean => true;
const NONE = (): boolean => false;
const CSUM = 1n << 1n;
const TSO4 = 1n << 7n;
const TSO6 = 1n << 8n;
const ECN = 1n << 9n;
const USO4 = 1n << 54n;
const USO6 = 1n << 55n;

const skipped = missingTools("ip", "ethtool") ?? enterNewNetwork();
const ports: TapPort[] = [];
const events: TapEvent[] = [];
let changes = 0;

beforeAll(() => {
  // IPv6 speaks by itself.
  if (skipped === undefined) writeFileSync("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
});

beforeEach((context) => {
  if (skipped !== undefined) context.skip(skipped);
});

afterEach(() => {
  // these are this machine's own interfaces
  if (skipped !== undefined) return;
  for (const port of ports.splice(0)) port.close();
  events.length = 0;
  changes = 0;
  for (const name of interfaces()) if (name !== "lo") ip("link", "del", name);
});

function ip(...words: string[]): string {
  return execFileSync("ip", words, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
}

/** What was made before the test, by somebody else. */
function addTap(name: string, ...words: string[]): void {
  ip("tuntap", "add", "dev", name, "mode", "tap", ...words);
}

function interfaces(): string[] {
  return (JSON.parse(ip("-j", "link", "show")) as { ifname: string }[]).map(({ ifname }) => ifname);
}

function fds(): number {
  return readdirSync("/proc/self/fd").length;
}

/** What a port tells, but the way in which its queues will be read: that is no news of the interface. */
function observe(event: TapEvent): void {
  if (event.type !== "method") events.push(event);
}

/** A port that is not open yet. @param queuePairs of the other port of its link */
function makePort(text: string, queuePairs = 1): TapPort {
  const spec = parsePort(text) as TapSpec;
  const port = new TapPort({ queuePairs, ...spec, onEvent: observe });
  ports.push(port);
  return port;
}

function openPort(text: string, queuePairs = 1): TapPort {
  const port = makePort(text, queuePairs);
  port.open(async (apply) => {
    changes++;
    apply();
  });
  return port;
}

/** Opening fails, with nothing left behind. @returns the error */
function refusedPort(text: string, queuePairs = 1): Error {
  const before = [fds(), interfaces()];
  try {
    openPort(text, queuePairs);
  } catch (error) {
    expect([fds(), interfaces()]).toEqual(before);
    return error as Error;
  }
  throw new Error(`${text} was opened`);
}

/** Runs with no privileges at all. */
function asNobody<T>(action: () => T): T {
  process.seteuid?.(NOBODY);
  try {
    return action();
  } finally {
    process.seteuid?.(0);
  }
}

/** Waits for what the kernel tells. */
async function until(isSo: () => boolean): Promise<void> {
  const deadline = performance.now() + 30_000;
  while (!isSo()) {
    if (performance.now() > deadline) throw new Error(`it did not come to that; events: ${JSON.stringify(events)}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** Gives the interface an address, so that the host's stack sends to a guest behind it. */
function addressed(name: string): void {
  ip("addr", "add", `${HOST}/24`, "dev", name);
  ip("neigh", "add", GUEST, "lladdr", GUEST_MAC, "dev", name);
}

async function udpSocket(port: number): Promise<Socket> {
  const socket = createSocket("udp4");
  socket.bind(port, HOST);
  await once(socket, "listening");
  return socket;
}

/** Sends datagrams to the guest, each a flow of its own. */
async function sendToGuest(...texts: string[]): Promise<void> {
  for (const text of texts) {
    const socket = await udpSocket(0);
    await new Promise<void>((resolve, reject) =>
      socket.send(text, PORT, GUEST, (error) => (error ? reject(error) : resolve())),
    );
    socket.close();
  }
}

/** Frames that wait in a queue: datagrams of sendToGuest(), with their net header's flags. */
function readQueue(fd: number | undefined): { text: string; flags: number }[] {
  const bytes = Buffer.alloc(70_000);
  const found: { text: string; flags: number }[] = [];
  for (;;) {
    let count: number;
    try {
      count = readSync(fd as number, bytes);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EAGAIN") return found;
      throw error;
    }
    const frame = bytes.subarray(NET_HDR_SIZE, count);
    // IPv4, UDP, to our port: behind 14 bytes of Ethernet, 20 of IP, 8 of UDP
    if (frame.readUInt16BE(12) !== 0x0800 || frame[23] !== 17 || frame.readUInt16BE(36) !== PORT) continue;
    found.push({ text: frame.toString("latin1", 42), flags: bytes[NET_HDR_FLAGS] as number });
  }
}

function textsIn(fd: number | undefined): string[] {
  return readQueue(fd).map(({ text }) => text);
}

/** The features of the interface, as the host's stack sees them, that a reader of its queues has a say in. */
function offloadsOf(name: string): string[] {
  const words: Record<string, string> = {
    "tx-checksum-ip-generic": "csum",
    "tx-tcp-segmentation": "tso4",
    "tx-tcp6-segmentation": "tso6",
    "tx-tcp-ecn-segmentation": "ecn",
    "tx-udp-segmentation": "uso",
  };
  const lines = execFileSync("ethtool", ["-k", name], { encoding: "utf8" }).split("\n");
  return lines.flatMap((line) => {
    const [key = "", value = ""] = line.trim().split(": ");
    return words[key] !== undefined && value.startsWith("on") ? [words[key]] : [];
  });
}

describe("opening", () => {
  it("tap:new: an interface of the kernel's naming, up, gone with its port", () => {
    const before = fds();
    const port = openPort("tap:new", 3);
    expect(port).toMatchObject({ kind: "tap", spec: "tap:new", name: "tap0", state: "up", mtu: 1500 });
    expect(new Set(port.queues).size).toBe(3);
    expect(findInterface("tap0")).toMatchObject({ isUp: true, kind: "tun", tun: { isTap: true, queues: 3 } });
    port.close();
    expect(interfaces()).toEqual(["lo"]);
    expect(fds()).toBe(before);
    expect(port.queues).toEqual([]);
  });

  it("tap:NAME: made if it is not there", () => {
    const port = openPort("tap:made,mtu=9000,queues=2", 2);
    expect(findInterface("made")).toMatchObject({ isUp: true, mtu: 9000, tun: { isPersistent: false, queues: 2 } });
    expect(port.mtu).toBe(9000);
    port.close();
    expect(interfaces()).toEqual(["lo"]);
  });

  it("tap:NAME: attached to if it is there, with whatever flags but multi_queue; stays when the port goes", () => {
    for (const words of [["multi_queue", "vnet_hdr"], ["multi_queue"], ["multi_queue", "pi"]]) {
      addTap("mine", ...words);
      const port = openPort("tap:mine,mtu=2000", 2);
      expect(findInterface("mine")).toMatchObject({ isUp: true, mtu: 2000, tun: { isPersistent: true, queues: 2 } });
      port.follow(0n, ALL);
      expect(port.queues.map((fd) => readQueue(fd))).toEqual([[], []]);
      port.close();
      expect(findInterface("mine")).toMatchObject({ isUp: true, mtu: 2000, tun: { queues: 0 } });
      ip("link", "del", "mine");
    }
  });

  it("one without multi_queue has one queue, and works with it", async () => {
    addTap("single");
    const port = openPort("tap:single", 1);
    addressed("single");
    port.follow(0n, ALL);
    await sendToGuest("hello");
    expect(textsIn(port.queues[0])).toEqual(["hello"]);
    port.close();
    expect(refusedPort("tap:single", 2).message).toMatch(
      /2 queues of single; it was made without multi_queue: "ip tuntap del dev single mode tap", then "ip tuntap add.*EINVAL/,
    );
  });

  it("128 queues, as many as a vhost-user port has queue pairs", () => {
    const port = openPort("tap:new", 128);
    port.follow(0n, ALL);
    expect(findInterface(port.name)?.tun?.queues).toBe(128);
    port.follow(0n, (pair) => pair === 5);
    port.follow(0n, NONE);
  });

  it("the user's way of reading and writing goes first; without it all ways may be tried", () => {
    expect(makePort("tap:new,io=aio").methods).toEqual(["aio"]);
    expect(makePort("tap:new").methods).toEqual(["io_uring", "aio", "rw"]);
  });

  it("joins a bridge", () => {
    ip("link", "add", "br0", "type", "bridge");
    const bridge = findInterface("br0")?.index;
    expect(findInterface(openPort("tap:new,bridge=br0").name)).toMatchObject({ master: bridge, isUp: true });
    addTap("mine");
    const port = openPort("tap:mine,bridge=br0");
    port.close();
    expect(findInterface("mine")?.master).toBe(bridge);
  });
});

describe("what cannot be opened", () => {
  it("a bridge that is none", () => {
    addTap("other");
    expect(refusedPort("tap:new,bridge=other")).toEqual(new ConfigError("bridge=other: that interface is no bridge"));
    expect(refusedPort("tap:mine,bridge=br7").message).toMatch(/no such interface; "ip link add br7 type bridge"/);
  });

  it.each([
    ["a TUN", () => ip("tuntap", "add", "dev", "x", "mode", "tun"), /of x; it is no TAP interface but TUN.*EINVAL/],
    ["a bridge", () => ip("link", "add", "x", "type", "bridge"), /of x; it is no TAP interface but bridge.*EINVAL/],
  ])("%s by that name", (_, add, message) => {
    add();
    expect(refusedPort("tap:x").message).toMatch(message);
  });

  it("one that another program has, with multi_queue or without", () => {
    const other = openTap("shared", 1);
    expect(refusedPort("tap:shared")).toMatchObject({ code: "EBUSY", syscall: "TUNSETIFF" });
    setAttached(other.fds[0] as number, false);
    expect(refusedPort("tap:shared").message).toMatch(/queue of shared; another program has it open/);
    other.fds.forEach(closeSync);
    addTap("single");
    openPort("tap:single");
    expect(refusedPort("tap:single")).toMatchObject({ code: "EBUSY" });
  });

  it("without CAP_NET_ADMIN: an interface that is not there, or somebody else's", () => {
    const missing = refusedAsNobody("tap:fresh");
    expect(missing).toMatchObject({ code: "EPERM" });
    expect(missing.message).toContain('"ip tuntap add dev fresh mode tap multi_queue vnet_hdr user 65534"');
    expect(refusedAsNobody("tap:new").message).toContain("to create it takes CAP_NET_ADMIN");
    addTap("theirs", "multi_queue", "user", "1");
    expect(refusedAsNobody("tap:theirs").message).toContain("it is not this user's");
  });

  it("an MTU that the interface cannot have: one that was there is as it was", () => {
    expect(refusedPort("tap:new,mtu=65535").message).toMatch(/ip link set dev tap0 mtu 65535 up\): .*EINVAL/);
    ip("link", "add", "br0", "type", "bridge");
    addTap("mine");
    expect(refusedPort("tap:mine,mtu=65535,bridge=br0")).toBeInstanceOf(SystemError);
    expect(findInterface("mine")).toMatchObject({ mtu: 1500, master: 0, isUp: false });
  });

  function refusedAsNobody(text: string): Error {
    const before = [fds(), interfaces()];
    const error = asNobody(() => {
      try {
        openPort(text);
        return new Error("it was opened");
      } catch (reason) {
        return reason as Error;
      }
    });
    expect([fds(), interfaces()]).toEqual(before);
    return error;
  }
});

describe("without privileges, an interface that root made", () => {
  it("works; if it is down, that is said", async () => {
    addTap("mine", "multi_queue", "user", String(NOBODY));
    const port = asNobody(() => openPort("tap:mine", 2));
    expect(port.state).toBe("down");
    expect(events).toEqual([{ type: "down", name: "mine" }]);
    ip("link", "set", "mine", "up");
    await until(() => port.state === "up");
    addressed("mine");
    asNobody(() => port.follow(CSUM, (pair) => pair === 0));
    await sendToGuest("hello");
    expect(textsIn(port.queues[0])).toEqual(["hello"]);
  });

  it("is not changed: what root is to do is said; what is so already is fine", () => {
    ip("link", "add", "br0", "type", "bridge");
    addTap("mine", "multi_queue", "user", String(NOBODY));
    expect(() => asNobody(() => openPort("tap:mine,mtu=9000,bridge=br0"))).toThrow(
      /have root do "ip link set dev mine mtu 9000 master br0 up" before: RTM_SETLINK: EPERM/,
    );
    ip("link", "set", "dev", "mine", "mtu", "9000", "master", "br0", "up");
    expect(asNobody(() => openPort("tap:mine,mtu=9000,bridge=br0")).state).toBe("up");
  });
});

describe("ready fds", () => {
  it("are the relay's from then on: one a queue, closed with the port", async () => {
    const before = fds();
    const given = openTap("given", 2);
    const port = asNobody(() => makePort(`tap:fd=${given.fds.join(",fd=")}`));
    ip("link", "set", "given", "up");
    asNobody(() => port.open((apply) => Promise.resolve(apply())));
    expect(port).toMatchObject({ name: "given", state: "up", mtu: 1500, queues: given.fds });
    addressed("given");
    port.follow(0n, ALL);
    await sendToGuest("one", "two", "three");
    expect(port.queues.flatMap(textsIn).toSorted()).toEqual(["one", "three", "two"]);
    port.close();
    expect(interfaces()).toEqual(["lo"]);
    await until(() => fds() === before);
  });

  it("one that its owner before had detached is attached again", () => {
    const { fds } = openTap("given", 2);
    for (const fd of fds) setAttached(fd, false);
    const port = openPort(`tap:fd=${fds.join(",fd=")}`);
    port.follow(0n, ALL);
    expect(port.queues.map((fd) => readQueue(fd))).toEqual([[], []]);
  });

  it("of something else are refused, and left alone", () => {
    const [end, otherEnd] = pipe();
    const file = openSync("/dev/null", "r");
    const loose = openSync("/dev/net/tun", "r+");
    const [a, b] = [openTap("a", 1), openTap("b", 1)];
    const refusal = (text: string): string => refusedPort(text).message;
    expect(refusal(`tap:fd=${end}`)).toBe(`fd ${end} is no TAP interface; pass one that was opened from /dev/net/tun`);
    expect(refusal(`tap:fd=${file}`)).toContain(`fd ${file} is no TAP interface`);
    expect(refusal(`tap:fd=${loose}`)).toContain(`fd ${loose} is of no interface`);
    expect(refusal("tap:fd=999999")).toContain("fd 999999 is not open");
    expect(refusal(`tap:fd=${a.fds[0]},fd=${b.fds[0]}`)).toContain("of two interfaces, a and b");
    for (const fd of [end, otherEnd, file, loose, ...a.fds, ...b.fds]) {
      expect(fstatSync(fd)).toBeDefined();
      closeSync(fd);
    }
  });

  it("of an interface in another network namespace work, unwatched", async () => {
    const given = openTap("away", 1);
    using _elsewhere = await moveAway("away");
    const port = openPort(`tap:fd=${given.fds[0]}`);
    expect(port).toMatchObject({ name: "away", state: "up", mtu: undefined });
    port.follow(CSUM | TSO4, ALL);
    port.follow(0n, NONE);
    port.close();
    const again = openTap("away", 1);
    using _there = await moveAway("away");
    expect(() => openPort(`tap:fd=${again.fds[0]},mtu=1500`)).toThrow(/away is in another network namespace/);
  });
});

describe("news", () => {
  it("of the interface: up, down, MTU, another name, gone; nothing of other ones", async () => {
    const port = openPort("tap:new");
    addTap("other");
    ip("link", "set", "other", "up");
    ip("link", "set", "tap0", "down");
    await until(() => port.state === "down");
    ip("link", "set", "tap0", "name", "vm0");
    await until(() => port.name === "vm0");
    ip("link", "set", "vm0", "mtu", "1400");
    ip("link", "set", "vm0", "up");
    await until(() => port.state === "up" && port.mtu === 1400);
    ip("link", "del", "vm0");
    await until(() => port.state === "gone");
    expect(events.filter(({ type }) => type !== "mtu")).toEqual([
      { type: "down", name: "tap0" },
      { type: "up", name: "vm0" },
      // It went down before; but when that news is read, nothing can be brought up any more.
      { type: "gone", name: "vm0" },
    ]);
    expect(events.filter(({ type }) => type === "mtu")).toEqual([{ type: "mtu", name: "vm0", mtu: 1400 }]);
    expect(changes).toBe(events.length);
    port.follow(CSUM, ALL);
    port.inject(new Uint8Array(60));
    port.close();
    expect(events).toHaveLength(4);
  });

  it("of one that moves to another network namespace: it goes on, unwatched", async () => {
    const port = openPort("tap:new");
    using _elsewhere = await moveAway("tap0");
    await until(() => events.some(({ type }) => type === "moved"));
    expect(port).toMatchObject({ state: "up", mtu: undefined });
    port.follow(CSUM, ALL);
    expect(events.filter(({ type }) => type === "fault")).toEqual([]);
  });

  it("more than the kernel keeps for us: the last state is known", async () => {
    const port = openPort("tap:new");
    const batch = Array.from({ length: 2000 }, (_, i) => `link set tap0 mtu ${1000 + i}`);
    // this thread reads none of it meanwhile
    execFileSync("ip", ["-batch", "-"], { input: `${batch.join("\n")}\nlink set tap0 down\n` });
    await until(() => port.state === "down" && port.mtu === 2999);
    // and news come as before
    ip("link", "set", "tap0", "up");
    await until(() => port.state === "up");
  });

  it("an interface that goes while nobody looks is no fault", () => {
    const port = openPort("tap:new", 2);
    ip("link", "del", "tap0");
    port.follow(CSUM, ALL);
    port.follow(0n, NONE);
    expect(events).toEqual([]);
  });
});

describe("offloads", () => {
  const needsUso = (port: TapPort): boolean => port.features.includes(54);

  it("are offered as far as the kernel has them", () => {
    const port = openPort("tap:new");
    const uso = needsUso(port) ? [54, 55, 56] : [];
    expect(port.features.toSorted((a, b) => a - b)).toEqual([0, 1, 7, 8, 9, 11, 12, 13, ...uso]);
    expect(offloadsOf(port.name)).toEqual([]);
  });

  it.each([
    ["everything", CSUM | TSO4 | TSO6 | ECN | USO4 | USO6, ["csum", "tso4", "ecn", "tso6", "uso"]],
    ["checksums", CSUM, ["csum"]],
    ["IPv6 only", CSUM | TSO6 | ECN, ["csum", "ecn", "tso6"]],
    ["ECN without TSO is nothing", CSUM | ECN, ["csum"]],
    ["nothing goes without checksums", TSO4 | TSO6 | ECN | USO4 | USO6, []],
    ["half of USO is nothing", CSUM | TSO4 | USO4, ["csum", "tso4"]],
  ])("follow what the guest takes: %s", (_, features, expected) => {
    for (const words of [[], ["multi_queue"]]) {
      addTap("mine", ...words);
      const port = openPort("tap:mine", 1);
      const all = needsUso(port) ? expected : expected.filter((offload) => offload !== "uso");
      port.follow(features, ALL);
      expect(offloadsOf("mine").toSorted()).toEqual(all.toSorted());
      port.follow(CSUM | TSO4, ALL);
      expect(offloadsOf("mine").toSorted()).toEqual(["csum", "tso4"]);
      port.follow(features, NONE);
      expect(offloadsOf("mine")).toEqual([]);
      port.follow(features, ALL);
      expect(offloadsOf("mine").toSorted()).toEqual(all.toSorted());
      port.close();
      expect(offloadsOf("mine")).toEqual([]);
      ip("link", "del", "mine");
    }
    expect(events).toEqual([]);
  });

  it("frames that a guest cannot take any more are thrown away, by either kind of interface", async () => {
    for (const words of [[], ["multi_queue"]]) {
      addTap("mine", ...words);
      const port = openPort("tap:mine", 1);
      addressed("mine");
      port.follow(CSUM, ALL);
      await sendToGuest("read");
      expect(readQueue(port.queues[0])).toEqual([{ text: "read", flags: VIRTIO_NET_HDR_F_NEEDS_CSUM }]);
      await sendToGuest("unread");
      port.follow(0n, ALL);
      await sendToGuest("whole");
      expect(readQueue(port.queues[0])).toEqual([{ text: "whole", flags: 0 }]);
      // more is no reason to lose any
      await sendToGuest("kept");
      port.follow(CSUM, ALL);
      expect(textsIn(port.queues[0])).toEqual(["kept"]);
      port.close();
      ip("link", "del", "mine");
    }
  });
});

describe("queues in use", () => {
  it.each([
    ["with multi_queue", ["multi_queue"]],
    ["without", []],
  ])("nothing waits for a guest that is not there: an interface %s", async (_, words) => {
    addTap("mine", ...words);
    const port = openPort("tap:mine", 1);
    addressed("mine");
    await sendToGuest("before");
    port.follow(0n, ALL);
    await sendToGuest("one");
    expect(textsIn(port.queues[0])).toEqual(["one"]);
    await sendToGuest("unread");
    port.follow(0n, NONE);
    await sendToGuest("between");
    port.follow(0n, ALL);
    await sendToGuest("two");
    expect(textsIn(port.queues[0])).toEqual(["two"]);
    // the interface itself never seems unplugged
    expect(ip("link", "show", "mine")).toContain("LOWER_UP");
  });

  it("all flows go to those", async () => {
    const port = openPort("tap:new", 4);
    addressed("tap0");
    const texts = Array.from({ length: 40 }, (_, i) => `flow ${i}`).toSorted();
    for (const used of [[0, 1, 2, 3], [2], [1, 3], [0, 1, 2], [3]]) {
      port.follow(0n, (pair) => used.includes(pair));
      await sendToGuest(...texts);
      expect(used.flatMap((pair) => textsIn(port.queues[pair])).toSorted()).toEqual(texts);
      const unused = [0, 1, 2, 3].filter((pair) => !used.includes(pair));
      expect(unused.flatMap((pair) => textsIn(port.queues[pair]))).toEqual([]);
    }
  });

  it("a guest with more queue pairs uses what there is", () => {
    const port = openPort("tap:new,queues=2", 2);
    port.follow(CSUM, (pair) => pair < 8);
    expect(port.queues.map((fd) => readQueue(fd))).toEqual([[], []]);
  });

  it("before it is open and after it is closed, following and injecting do nothing", () => {
    const port = makePort("tap:new");
    port.follow(CSUM, ALL);
    port.inject(new Uint8Array(60));
    port.open(async () => {});
    port.close();
    port.follow(CSUM, ALL);
    port.inject(new Uint8Array(60));
    port.close();
    expect(events).toEqual([]);
  });
});

describe("a frame that is injected", () => {
  it.each([
    ["with multi_queue", ["multi_queue"], ALL],
    ["with multi_queue, from which no guest receives", ["multi_queue"], NONE],
    ["without", [], ALL],
    ["without, from which no guest receives", [], NONE],
  ])("comes from the interface, if it can: one %s", async (_, words, used) => {
    addTap("mine", ...words);
    const port = openPort("tap:mine", 1);
    addressed("mine");
    const frame = datagramTo(findInterface("mine")?.address ?? "", "from the guest");
    const socket = await udpSocket(PORT);
    try {
      port.follow(CSUM | TSO4, used);
      const [first] = await Promise.all([once(socket, "message"), port.inject(frame)]);
      expect(String(first[0])).toBe("from the guest");
      ip("link", "set", "mine", "down");
      port.inject(frame);
    } finally {
      socket.close();
    }
    expect(events.filter(({ type }) => type === "fault")).toEqual([]);
  });

  /** Ethernet, IPv4, UDP without a checksum. */
  function datagramTo(mac: string, text: string): Buffer {
    const bytes = Buffer.alloc(42 + text.length);
    bytes.write(mac.replaceAll(":", ""), 0, "hex");
    bytes.write(GUEST_MAC.replaceAll(":", ""), 6, "hex");
    bytes.writeUInt16BE(0x0800, 12);
    bytes.writeUInt16BE(0x4500, 14);
    bytes.writeUInt16BE(28 + text.length, 16);
    bytes.writeUInt16BE(0x4011, 22);
    Buffer.from([...GUEST.split("."), ...HOST.split(".")].map(Number)).copy(bytes, 26);
    let sum = 0;
    for (let at = 14; at < 34; at += 2) sum += bytes.readUInt16BE(at);
    bytes.writeUInt16BE(0xffff - ((sum & 0xffff) + (sum >>> 16)), 24);
    bytes.writeUInt16BE(PORT, 34);
    bytes.writeUInt16BE(PORT, 36);
    bytes.writeUInt16BE(8 + text.length, 38);
    bytes.write(text, 42);
    return bytes;
  }
});

/** Moves an interface to a network namespace of its own; disposing of that deletes it, unless it is held. */
async function moveAway(name: string): Promise<Disposable> {
  const program = spawn("unshare", ["--net", "sh", "-c", "echo there; exec sleep 1000"], {
    stdio: ["ignore", "pipe", "ignore"],
  });
  await once(program.stdout, "data");
  ip("link", "set", name, "netns", String(program.pid));
  return {
    [Symbol.dispose]() {
      program.kill();
    },
  };
}

it("adopting nothing is refused", () => {
  expect(() => adoptTap([])).toThrow(ConfigError);
});
