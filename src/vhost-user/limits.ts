/**
 * What one connection can cost us. docs/PROTOCOL.md, 18 has the whole table, with the limits that follow from the protocol.
 */

/** How long a front-end may stay silent after connecting, take for one message, or take to read an answer. */
export const TIMEOUT_MS = 5000;
/** How long a device's state may take through its pipe. */
export const STATE_TIMEOUT_MS = 5000;
/** Frames that SEND_RARP makes us send. QEMU asks for five, in a second. */
export const ANNOUNCEMENTS = { burst: 16, perSecond: 4 };

/** Lets things happen `perSecond` times a second on average, and up to `burst` times at once. */
export class Rate {
  readonly #burst: number;
  readonly #perSecond: number;
  #left: number;
  #at = performance.now();

  constructor({ burst, perSecond }: { burst: number; perSecond: number }) {
    this.#burst = burst;
    this.#perSecond = perSecond;
    this.#left = burst;
  }

  /** Whether it may happen once more now. */
  take(): boolean {
    const now = performance.now();
    this.#left = Math.min(this.#burst, this.#left + ((now - this.#at) / 1000) * this.#perSecond);
    this.#at = now;
    if (this.#left < 1) return false;
    this.#left--;
    return true;
  }
}
