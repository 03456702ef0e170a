/** What no program of ours sends beside a message: several control messages, credentials, secret memory. Sent by a few lines of C. */
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readdirSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Relay, type RelayEvent } from "../../src/index.ts";

/** argv: socket path, case. Prints the size and the last 64 bits of the answer; exits with 77 if the kernel has no such thing. */
const PROGRAM = `
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static int connected;

/* One message with these control messages; prints what comes back. */
static int exchange(const void *message, size_t size, void *control, size_t control_size) {
  struct iovec part = {(void *)message, size};
  struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = control_size};
  if (sendmsg(connected, &header, 0) < 0) return perror("sendmsg"), 1;
  uint32_t answer[5] = {0};
  ssize_t got = recv(connected, answer, sizeof answer, MSG_WAITALL);
  uint64_t value;
  memcpy(&value, answer + 3, 8);
  printf("%zd %llu\\n", got, (unsigned long long)value);
  return 0;
}

static struct cmsghdr *put(struct msghdr *all, struct cmsghdr *at, int type, const void *data, size_t size) {
  at->cmsg_level = SOL_SOCKET;
  at->cmsg_type = type;
  at->cmsg_len = CMSG_LEN(size);
  memcpy(CMSG_DATA(at), data, size);
  return CMSG_NXTHDR(all, at);
}

int main(int argc, char **argv) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (argc != 3) return 2;
  strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
  connected = socket(AF_UNIX, SOCK_STREAM, 0);
  if (connect(connected, (void *)&address, sizeof address) < 0) return perror("connect"), 1;
  char control[256] = {0};
  struct msghdr all = {.msg_control = control, .msg_controllen = sizeof control};
  struct cmsghdr *at = CMSG_FIRSTHDR(&all);
  const uint32_t get_features[3] = {1, 1, 0};

  if (!strcmp(argv[2], "rights")) { /* two control messages, of one and of two fds */
    int fds[2];
    if (pipe(fds) < 0) return 1;
    at = put(&all, at, SCM_RIGHTS, fds, sizeof fds[0]);
    at = put(&all, at, SCM_RIGHTS, fds, sizeof fds);
    return exchange(get_features, sizeof get_features, control, CMSG_SPACE(4) + CMSG_SPACE(8));
  }
  if (!strcmp(argv[2], "credentials")) {
    struct ucred me = {getpid(), getuid(), getgid()};
    put(&all, at, SCM_CREDENTIALS, &me, sizeof me);
    return exchange(get_features, sizeof get_features, control, CMSG_SPACE(sizeof me));
  }
  /* secret memory as the one region of a memory table; the acknowledgement needs REPLY_ACK, protocol feature 3 */
  int secret = syscall(447, 0);
  if (secret < 0) return 77;
  if (ftruncate(secret, 0x10000) < 0) return perror("ftruncate"), 1;
  const uint32_t set_protocol_features[5] = {16, 1, 8, 1 << 3, 0};
  if (write(connected, set_protocol_features, sizeof set_protocol_features) < 0) return 1;
  uint32_t table[13] = {5, 1 | 8, 40, 1};
  table[7] = 0x10000; /* regions: gpa, size, user address, mmap offset, 64 bits each, behind count and padding */
  put(&all, at, SCM_RIGHTS, &secret, sizeof secret);
  return exchange(table, sizeof table, control, CMSG_SPACE(4));
}
`;

const directory = mkdtempSync(join(tmpdir(), "vhost-relay-test-"));
const binary = join(directory, "ancillary");
const path = join(directory, "a.sock");
const compiled = spawnSync("cc", ["-Wall", "-x", "c", "-", "-o", binary], { input: PROGRAM, encoding: "utf8" });
const missing = compiled.error && process.env["CI"] !== "true" ? `no C compiler: ${compiled.error.message}` : undefined;

/** What the relay answers: its size in bytes, and the payload. */
async function send(what: string): Promise<{ status: number | null; output: string }> {
  const child = spawn(binary, [path, what], { stdio: ["ignore", "pipe", "inherit"] });
  let output = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => (output += text));
  const [status] = (await once(child, "close")) as [number | null];
  return { status, output: output.trim() };
}

const fdCount = (): number => readdirSync("/proc/self/fd").length;

describe.skipIf(missing !== undefined)(`ancillary data${missing ? `: ${missing}` : ""}`, () => {
  let relay: Relay;
  const events: RelayEvent[] = [];

  beforeAll(async () => {
    expect(compiled.stderr).toBe("");
    relay = await Relay.start({ links: [[`vhost-user:${path}`, "null"]], onEvent: (event) => events.push(event) });
  });

  afterAll(async () => {
    await relay?.[Symbol.asyncDispose]();
    rmSync(directory, { recursive: true });
  });

  /** The connection is gone, and nothing of it is left. */
  async function expectNothingLeft(before: number): Promise<void> {
    await expect.poll(() => relay.state.links[0]!.ports[0].state).toBe("listening");
    await expect.poll(fdCount).toBe(before);
  }

  it("BI-019 several SCM_RIGHTS control messages: the request takes no fds, all of them are closed", async () => {
    const before = fdCount();
    for (let i = 0; i < 20; i++) {
      const { status, output } = await send("rights");
      expect(status).toBe(0);
      expect(output).toMatch(/^(20 \d+|0 0)$/); // answered, or the connection closed
    }
    await expectNothingLeft(before);
  });

  it("BI-022 credentials are ignored", async () => {
    const before = fdCount();
    const { status, output } = await send("credentials");
    expect(status).toBe(0);
    expect(output).toMatch(/^20 [1-9]\d*$/);
    await expectNothingLeft(before);
  });

  it("BI-078 memfd_secret is no guest memory", async (context) => {
    const before = fdCount();
    const { status, output } = await send("secret");
    if (status === 77) return context.skip("this kernel has no memfd_secret");
    expect(status).toBe(0);
    expect(output).toBe("20 1");
    expect(events).toContainEqual(expect.objectContaining({ type: "refusal", request: "SET_MEM_TABLE" }));
    await expectNothingLeft(before);
  });
});
