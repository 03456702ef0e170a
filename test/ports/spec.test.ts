import { describe, expect, it } from "vitest";
import { ConfigError } from "../../src/errors.ts";
import { parsePort } from "../../src/ports/spec.ts";

describe("a port as a user writes it", () => {
  it.each([
    [
      "vhost-user:/run/a.sock",
      { kind: "vhost-user", socket: { path: "/run/a.sock" }, queuePairs: 1, queueUnit: "pairs", mac: undefined },
    ],
    ["vhost-user:/run/a.sock,connect", { socket: { path: "/run/a.sock", connect: true }, queuePairs: 1 }],
    ["vhost-user:a:b.sock,queues=128,connect", { socket: { path: "a:b.sock", connect: true }, queuePairs: 128 }],
    ["vhost-user:fd=3,queues=2", { socket: { fd: 3 }, queuePairs: 2 }],
    ["vhost-user:./fd=3", { socket: { path: "./fd=3" } }],
    ["vhost-user:/a,queue-unit=vrings", { queueUnit: "vrings" }],
    ["vhost-user:/a,mac=52:54:00:AB:cd:01", { mac: Uint8Array.of(0x52, 0x54, 0, 0xab, 0xcd, 1) }],
    ["vhost-user:/a,mtu=68", { mtu: 68 }],
    ["vhost-user:/a,mtu=65535", { mtu: 65535 }],
    ["vhost-user:/a,guest-announce", { guestAnnounce: true }],
    ["vhost-user:/a,memory-max=8G", { memoryMaxBytes: 8n << 30n }],
    ["vhost-user:/a,memory-max=65536", { memoryMaxBytes: 65536n }],
    ["vhost-user:/a,memory-max=80G", { memoryMaxBytes: 80n << 30n }],
    ["loopback", { kind: "loopback" }],
    ["null", { kind: "null" }],
  ])("%s", (text, expected) => {
    expect(parsePort(text)).toMatchObject({ text, ...expected });
  });

  it.each([
    ["", /unknown kind/],
    ["tap0", /unknown kind "tap0".*vhost-user:PATH/],
    ["vhost-user:", /path is missing/],
    ["vhost-user", /path is missing/],
    [`vhost-user:/${"x".repeat(107)}`, /at most 107 bytes, this one 108/],
    ["vhost-user:/a,queues=0", /queues=0/],
    ["vhost-user:/a,queues=129", /1 to 128/],
    ["vhost-user:/a,queues=1e1", /1 to 128/],
    ["vhost-user:/a,server", /unknown option "server"/],
    ["vhost-user:/a,constructor", /unknown option "constructor"/],
    ["vhost-user:/a,connect=1", /connect takes no value/],
    ["vhost-user:fd=x", /fd=x must be a number/],
    ["vhost-user:fd=3,connect", /fd is open already/],
    ["vhost-user:/a,queue-unit=rings", /pairs or vrings/],
    ["vhost-user:/a,mac=52:54:00:12:34", /mac=52:54:00:12:34 .*example/],
    ["vhost-user:/a,mac=01:00:5e:00:00:01", /one station/],
    ["vhost-user:/a,mac=00:00:00:00:00:00", /one station/],
    ["vhost-user:/a,mtu=67", /68 to 65535/],
    ["vhost-user:/a,mtu=65536", /68 to 65535/],
    ["vhost-user:/a,mtu", /mtu= must be a number/],
    ["vhost-user:/a,guest-announce=on", /guest-announce takes no value/],
    ["vhost-user:/a,memory-max=0", /must be a size such as 8G/],
    ["vhost-user:/a,memory-max=1T", /must be a size such as 8G/],
    ["vhost-user:/a,memory-max=81G", /at most 80G/],
    ["vhost-user:/a,memory-max", /must be a size such as 8G/],
    ["loopback:/a", /neither address nor options/],
    ["null,queues=2", /neither address nor options/],
  ])("refuses %j, saying why", (text, message) => {
    expect(() => parsePort(text)).toThrow(ConfigError);
    expect(() => parsePort(text)).toThrow(message);
  });
});
