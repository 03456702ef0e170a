/** The directory of the control sockets: whose it must be, and what is left in it. */
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { close } from "../../native/libc.ts";
import { listen } from "../../native/socket.ts";
import { openDirectory, socketsIn } from "../../src/control/directory.ts";
import { ConfigError } from "../../src/errors.ts";

let parent: string;
let directory: string;

beforeEach(() => {
  parent = mkdtempSync(join(tmpdir(), "control-"));
  directory = join(parent, "sockets");
});

afterEach(() => rmSync(parent, { recursive: true }));

describe("the directory", () => {
  it("is made for this user alone", async () => {
    await openDirectory(directory);
    expect(statSync(directory).mode & 0o777).toBe(0o700);
    await openDirectory(directory);
    expect(socketsIn(directory)).toEqual([]);
  });

  it.each([0o770, 0o702, 0o777, 0o1777])("that others may write to (mode %o) is not used", async (mode) => {
    mkdirSync(directory);
    chmodSync(directory, mode);
    await expect(openDirectory(directory)).rejects.toThrow(/writable by others; remove it/);
    expect(() => socketsIn(directory)).toThrow(ConfigError);
  });

  it("that belongs to somebody else is not used", async () => {
    mkdirSync(directory, { mode: 0o700 });
    // Only root may give files away; for everybody else the root directory is somebody else's.
    const isRoot = process.getuid?.() === 0;
    if (isRoot) chownSync(directory, 12345, 12345);
    await expect(openDirectory(isRoot ? directory : "/")).rejects.toThrow(/belongs to user/);
  });

  it("that is a file, or cannot be made, is said with the way out", async () => {
    writeFileSync(directory, "");
    await expect(openDirectory(directory)).rejects.toThrow(/is no directory; remove it/);
    await expect(openDirectory(join(directory, "below"))).rejects.toThrow(/name a socket by --control: mkdir: ENOTDIR/);
  });

  it("that is a link to somewhere is not used", async () => {
    mkdirSync(join(parent, "elsewhere"), { mode: 0o700 });
    symlinkSync(join(parent, "elsewhere"), directory);
    await expect(openDirectory(directory)).rejects.toThrow(/is no directory/);
  });
});

it("sockets of relays that were killed are removed by the next relay, not by who only looks; live ones stay", async () => {
  await openDirectory(directory);
  const [dead, live] = [join(directory, "1.sock"), join(directory, "2.sock")];
  close(listen(dead));
  const listener = listen(live);
  try {
    expect(socketsIn(directory).toSorted()).toEqual([dead, live]);
    expect(existsSync(dead)).toBe(true);
    await openDirectory(directory);
    expect(socketsIn(directory)).toEqual([live]);
  } finally {
    close(listener);
  }
});
