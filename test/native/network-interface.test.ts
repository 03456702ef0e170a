/** Network interfaces: native/network-interface.ts, by rtnetlink. */
import { execFileSync } from "node:child_process";
import { readdirSync } from "node:fs";
import { afterEach, beforeEach, expect, it } from "vitest";
import { changeInterface, findInterface, watchInterface } from "../../native/network-interface.ts";
import type { NetworkInterface } from "../../native/network-interface.ts";
import { SystemError } from "../../src/errors.ts";
import { missingTools } from "../guests/tools.ts";
import { enterNewNetwork } from "./namespace.ts";

const skipped = missingTools("ip") ?? enterNewNetwork();
type News = NetworkInterface | "gone" | "moved";

beforeEach((context) => {
  if (skipped !== undefined) context.skip(skipped);
  ip("tuntap", "add", "dev", "t0", "mode", "tap", "multi_queue", "user", "7");
  ip("link", "add", "br0", "type", "bridge");
});

afterEach(() => {
  // these are this machine's own interfaces
  if (skipped !== undefined) return;
  for (const name of ["t0", "br0"]) if (findInterface(name)) ip("link", "del", name);
});

function ip(...words: string[]): string {
  return execFileSync("ip", words, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
}

function find(key: string | number): NetworkInterface {
  const found = findInterface(key);
  if (!found) throw new Error(`no interface ${key}`);
  return found;
}

async function until(isSo: () => boolean): Promise<void> {
  const deadline = performance.now() + 30_000;
  while (!isSo()) {
    if (performance.now() > deadline) throw new Error("it did not come to that");
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

it("is found by name and by index, as ip(8) shows it", () => {
  const [shown] = JSON.parse(ip("-j", "-d", "link", "show", "t0")) as [Record<string, unknown>];
  const { ifindex, mtu, address } = shown;
  const tun = { isTap: true, isMultiQueue: true, isPersistent: true, owner: 7, queues: 0 };
  expect(find("t0")).toEqual({ index: ifindex, name: "t0", isUp: false, mtu, address, master: 0, kind: "tun", tun });
  expect(find(ifindex as number)).toEqual(find("t0"));
  expect(find("br0")).toMatchObject({ kind: "bridge", tun: undefined });
  expect(find("lo")).toMatchObject({ index: 1, kind: undefined, address: "00:00:00:00:00:00" });
  expect(findInterface("t")).toBeUndefined();
  expect(findInterface(4711)).toBeUndefined();
});

it("is changed", () => {
  const { index } = find("t0");
  const bridge = find("br0").index;
  changeInterface(index, { mtu: 4000, master: bridge, isUp: true }, "all");
  expect(find("t0")).toMatchObject({ mtu: 4000, master: bridge, isUp: true });
  changeInterface(index, { isUp: false }, "down");
  expect(find("t0")).toMatchObject({ mtu: 4000, master: bridge, isUp: false });
  changeInterface(index, { master: 0 }, "leave");
  expect(find("t0").master).toBe(0);
});

it("is not changed to what cannot be: the kernel's reason is told", () => {
  const { index } = find("t0");
  const before = readdirSync("/proc/self/fd").length;
  const change = (mtu: number) => () => changeInterface(index, { mtu }, "setting the MTU of t0");
  expect(change(67)).toThrow(/^setting the MTU of t0: mtu less than device minimum: RTM_SETLINK: EINVAL$/);
  expect(change(1 << 20)).toThrow(/mtu greater than device maximum/);
  expect(() => changeInterface(index, { master: 1 }, "joining lo")).toThrow(SystemError);
  expect(() => changeInterface(4711, { isUp: true }, "none")).toThrow(/ENODEV/);
  process.seteuid?.(65_534);
  try {
    expect(change(1400)).toThrow(/EPERM/);
    expect(find("t0").mtu).toBe(1500);
  } finally {
    process.seteuid?.(0);
  }
  expect(readdirSync("/proc/self/fd")).toHaveLength(before);
});

it("is watched: of several only the one, until it is gone or nobody wants to know", async () => {
  const news: News[] = [];
  const others: News[] = [];
  let watches = 1;
  const watch = watchInterface(find("t0").index, (now) => news.push(now));
  const other = watchInterface(find("br0").index, (now) => {
    others.push(now);
    // within the news itself
    other[Symbol.dispose]();
    watches--;
  });
  ip("link", "set", "t0", "master", "br0");
  ip("link", "set", "t0", "mtu", "1300");
  ip("link", "set", "br0", "up");
  await until(() => watches === 0 && news.some((now) => typeof now === "object" && now.mtu === 1300));
  expect(news.every((now) => typeof now === "object" && now.name === "t0")).toBe(true);
  ip("link", "del", "t0");
  await until(() => news.at(-1) === "gone");
  watch[Symbol.dispose]();
  watch[Symbol.dispose]();
  ip("link", "del", "br0");
  expect(others).toHaveLength(1);
});
