/** What Linux guests do to each other: pings that are counted, and files whose bytes are checked. */
import { setTimeout as delay } from "node:timers/promises";
import { expect } from "vitest";
import type { LinuxGuest } from "./linux-guest.ts";

const data = "/srv/data";
const sum = "/tmp/sum";

/** Fifty pings, one as soon as the last is answered. */
export async function expectEveryPing(from: LinuxGuest, to: LinuxGuest, payloadBytes: number): Promise<void> {
  const output = await from.check(`ping -q -A -c 50 -s ${payloadBytes} ${to.ip}`);
  expect(output).toContain("50 packets transmitted, 50 packets received, 0% packet loss");
}

/** Has a guest serve a file of random bytes to downloads. */
export async function serveFile(guest: LinuxGuest, sizeMiB: number): Promise<void> {
  await guest.check(`
    mkdir -p /srv
    head -c ${sizeMiB}m /dev/urandom >${data}
    sha256sum <${data} >${data}.sum
    httpd -h /srv`);
}

/** A download over TCP, whose bytes are compared by their SHA-256. */
export class Download {
  readonly #from: LinuxGuest;
  readonly #to: LinuxGuest;

  static async start(from: LinuxGuest, to: LinuxGuest): Promise<Download> {
    await to.check(`
      rm -f ${sum}
      (wget -q -O - http://${from.ip}/${data.split("/").at(-1)} | sha256sum >${sum}.unfinished; mv ${sum}.unfinished ${sum}) &`);
    return new Download(from, to);
  }

  private constructor(from: LinuxGuest, to: LinuxGuest) {
    this.#from = from;
    this.#to = to;
  }

  async hasEnded(): Promise<boolean> {
    return (await this.#to.run(`test -e ${sum}`)).status === 0;
  }

  /** Resolves when another so many bytes have arrived. */
  async progress(bytes: number): Promise<void> {
    const received = "cat /sys/class/net/eth0/statistics/rx_bytes";
    await this.#to.check(
      `end=$(( $(${received}) + ${bytes} )); until [ $(${received}) -ge $end ]; do usleep 10000; done`,
    );
  }

  /** Resolves when every byte has arrived as it was sent. */
  async complete(): Promise<void> {
    while (!(await this.hasEnded())) await delay(100);
    expect(await this.#to.check(`cat ${sum}`)).toBe(await this.#from.check(`cat ${data}.sum`));
  }
}

/** Downloads the file that a guest serves. */
export async function expectDownload(from: LinuxGuest, to: LinuxGuest): Promise<void> {
  await (await Download.start(from, to)).complete();
}

/** Five pings a second, as long as it runs. */
export class LongPing {
  readonly #from: LinuxGuest;

  static async start(from: LinuxGuest, to: LinuxGuest): Promise<LongPing> {
    await from.check(`ping -i 0.2 ${to.ip} >/tmp/ping 2>&1 &`);
    return new LongPing(from);
  }

  private constructor(from: LinuxGuest) {
    this.#from = from;
  }

  /** Ends it; returns the lengths of the gaps: how many pings in a row were lost, each time some were. */
  async stop(): Promise<number[]> {
    const output = await this.#from.check("killall -INT ping; sleep 1; cat /tmp/ping");
    const answered = Array.from(output.matchAll(/ seq=(\d+) /g), ([, seq]) => Number(seq));
    expect(answered.length).toBeGreaterThan(0);
    return answered.map((seq, i) => seq - (answered[i - 1] ?? -1) - 1).filter((lost) => lost > 0);
  }
}
