import { describe, expect, it } from "vitest";
import { ConfigError } from "../../src/errors.ts";
import { parsePort } from "../../src/ports/spec.ts";

describe("a port as a user writes it", () => {
  it.each([
    ["vhost-user:/run/a.sock", { kind: "vhost-user", path: "/run/a.sock", connect: false, queuePairs: 1 }],
    ["vhost-user:/run/a.sock,connect", { kind: "vhost-user", path: "/run/a.sock", connect: true, queuePairs: 1 }],
    ["vhost-user:a:b.sock,queues=128,connect", { path: "a:b.sock", connect: true, queuePairs: 128 }],
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
    ["loopback:/a", /neither address nor options/],
    ["null,queues=2", /neither address nor options/],
  ])("refuses %j, saying why", (text, message) => {
    expect(() => parsePort(text)).toThrow(ConfigError);
    expect(() => parsePort(text)).toThrow(message);
  });
});
