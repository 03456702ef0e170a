import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { drain, eventfdCreate, signal } from "../../native/eventfd.ts";
import { duplicate, fdKind, isMemoryFile, isReadWrite, isWritable } from "../../native/fd.ts";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { watch } from "../../native/poll.ts";
import { accept, connect, listen, receive, send, shutdown, socketpair } from "../../native/socket.ts";

const FD_CLOEXEC = 0o2000000;
let directory: string;
let path: string;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), "socket-"));
  path = join(directory, "s");
});

afterEach(() => rmSync(directory, { recursive: true }));

describe("file descriptors over a socket", () => {
  it("a received fd is the sender's open file, close-on-exec", () => {
    const [a, b] = socketpair();
    const sent = eventfdCreate();
    send(a, Buffer.from("x"), [sent]);
    const { fds, truncated } = receive(b, Buffer.alloc(8)) ?? { fds: [], truncated: true };
    const fd = fds[0] as number;
    signal(fd);
    expect(drain(sent)).toBe(1n);
    expect(truncated).toBe(false);
    const flags = /flags:\s*(\d+)/.exec(readFileSync(`/proc/self/fdinfo/${fd}`, "utf8"))?.[1];
    expect(Number.parseInt(flags ?? "0", 8) & FD_CLOEXEC).toBe(FD_CLOEXEC);
    [a, b, sent, fd].forEach(close);
  });

  it("all 253 fds of a message arrive in order", () => {
    const [a, b] = socketpair();
    const sent = eventfdCreate();
    const other = memfdCreate("other", 4096);
    const given = Array.from({ length: 253 }, (_, index) => (index % 3 === 0 ? other : sent));
    send(a, Buffer.from("x"), given);
    const fds = receive(b, Buffer.alloc(8))?.fds ?? [];
    expect(fds.map((fd) => fdKind(fd))).toEqual(given.map((fd) => fdKind(fd)));
    [a, b, sent, other, ...fds].forEach(close);
  });

  it("BI-023: MSG_CTRUNC is reported when this process has no fd left", () => {
    const program = `
      import { socketpair, send, receive } from "./native/socket.ts";
      import { openSync, closeSync } from "node:fs";
      const [a, b] = socketpair();
      send(a, Buffer.from("x"), [0, 1]);
      const buffer = Buffer.alloc(8);
      receive(a, buffer);
      let last;
      try { for (;;) last = openSync("/dev/null"); } catch {}
      closeSync(last);
      const { truncated, fds } = receive(b, buffer);
      console.log(JSON.stringify({ truncated, count: fds.length }));
      process.exit(0);`;
    const script = `ulimit -n 100; exec "${process.execPath}" --input-type=module -e '${program}'`;
    const output = execFileSync("sh", ["-c", script], { cwd: process.cwd(), encoding: "utf8" });
    expect(JSON.parse(output)).toEqual({ truncated: true, count: 1 });
  });
});

describe("a stream that does not block", () => {
  it("an empty socket gives undefined, a closed one 0 bytes", () => {
    const [a, b] = socketpair();
    expect(receive(b, Buffer.alloc(8))).toBeUndefined();
    shutdown(a);
    expect(receive(b, Buffer.alloc(8))?.count).toBe(0);
    [a, b].forEach(close);
  });

  it("a full socket takes 0 bytes", () => {
    const [a, b] = socketpair();
    const bytes = Buffer.alloc(65536);
    let sent = 0;
    for (let count = send(a, bytes); count > 0; count = send(a, bytes)) sent += count;
    expect(sent).toBeGreaterThan(0);
    [a, b].forEach(close);
  });

  it("a peer that is gone is EPIPE, not the death of the process", () => {
    const [a, b] = socketpair();
    close(b);
    expect(() => send(a, Buffer.from("x"))).toThrow(expect.objectContaining({ code: "EPIPE" }));
    close(a);
  });
});

describe("listening and connecting", () => {
  it("a connection is accepted, and none is undefined", () => {
    const listener = listen(path);
    expect(accept(listener)).toBeUndefined();
    const client = connect(path) as number;
    const server = accept(listener) as number;
    send(client, Buffer.from("hello"));
    const buffer = Buffer.alloc(8);
    expect(buffer.toString("utf8", 0, receive(server, buffer)?.count)).toBe("hello");
    [listener, client, server].forEach(close);
  });

  it("nobody listening is undefined: no file, and a file nobody serves", () => {
    expect(connect(path)).toBeUndefined();
    close(listen(path));
    expect(existsSync(path)).toBe(true);
    expect(connect(path)).toBeUndefined();
  });

  it("a stale socket file is replaced", () => {
    close(listen(path));
    const listener = listen(path);
    const client = connect(path);
    expect(client).toBeTypeOf("number");
    [listener, client as number].forEach(close);
  });

  it("BI-331: a path that is served is refused, and goes on being served", () => {
    const listener = listen(path);
    expect(() => listen(path)).toThrow(/already served/);
    const client = connect(path) as number;
    expect(client).toBeTypeOf("number");
    [listener, client].forEach(close);
  });

  it("a file that is no socket is left alone", () => {
    writeFileSync(path, "precious");
    expect(() => listen(path)).toThrow(/no socket/);
    expect(readFileSync(path, "utf8")).toBe("precious");
  });

  it("a path longer than 107 bytes is refused by its length", () => {
    expect(() => listen(join(directory, "x".repeat(108)))).toThrow(/the limit is 107/);
  });
});

describe("what an fd is", () => {
  it("tells eventfds, sockets, pipes and files apart", () => {
    const eventfd = eventfdCreate();
    const [a, b] = socketpair();
    const memfd = memfdCreate("m", 4096);
    expect([eventfd, a, memfd].map(fdKind)).toEqual(["eventfd", "socket", "other"]);
    expect([isWritable(eventfd), isReadWrite(memfd), isMemoryFile(memfd)]).toEqual([true, true, true]);
    [eventfd, a, b, memfd].forEach(close);
  });

  it("a duplicate is the same open file", () => {
    const eventfd = eventfdCreate();
    const copy = duplicate(eventfd);
    signal(copy);
    expect(drain(eventfd)).toBe(1n);
    [eventfd, copy].forEach(close);
  });
});

describe("watch", () => {
  it("promises settled in the callback go on without waiting for another event", async () => {
    const eventfd = eventfdCreate();
    const order: string[] = [];
    const woken = new Promise<void>((resolve) => {
      const watcher = watch(eventfd, { readable: true }, () => {
        watcher[Symbol.dispose]();
        setImmediate(() => order.push("next turn"));
        void Promise.resolve().then(() => {
          order.push("promise");
          resolve();
        });
      });
    });
    signal(eventfd);
    await woken;
    expect(order).toEqual(["promise"]);
    close(eventfd);
  });

  it("is level triggered, and silent once disposed", async () => {
    const eventfd = eventfdCreate();
    signal(eventfd);
    let calls = 0;
    const watcher = watch(eventfd, { readable: true }, () => calls++);
    while (calls < 3) await new Promise(setImmediate);
    watcher[Symbol.dispose]();
    const seen = calls;
    for (let turn = 0; turn < 5; turn++) await new Promise((resolve) => setTimeout(resolve, 1));
    expect(calls).toBe(seen);
    close(eventfd);
  });
});
