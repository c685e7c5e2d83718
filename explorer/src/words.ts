// Numbers as a reader wants to see them: rounded where the doubt begins, with a true minus sign.
export function number(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const small = value !== 0 && Math.abs(value) < 1e-3;
  return minus(trimmed(small ? value.toExponential(digits - 1) : value.toPrecision(digits)));
}

export function plusMinus(value: number, stderr: number): string {
  if (!(stderr > 0)) return number(value);
  const largest = Math.max(Math.abs(value), stderr);
  const exponent = Number.isFinite(largest) && largest > 0 && largest < 1e-3 ? Math.floor(Math.log10(largest)) : 0;
  const text = rounded(value / 10 ** exponent, stderr / 10 ** exponent);
  return exponent ? `(${text}) × 10${superscript(exponent)}` : text;
}

function rounded(value: number, stderr: number): string {
  const magnitude = Math.floor(Math.log10(stderr));
  const digits = stderr / 10 ** magnitude < 3.55 ? 2 : 1;
  const decimals = Math.max(0, digits - 1 - magnitude);
  return minus(`${value.toFixed(decimals)} ± ${stderr.toFixed(decimals)}`);
}

function trimmed(text: string): string {
  if (!text.includes("e")) return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
  const [mantissa, exponent] = text.split("e");
  return `${mantissa.replace(/\.?0+$/, "")} × 10${superscript(Number(exponent))}`;
}

function minus(text: string): string {
  return text.replace(/-/g, "−").replace(/−(0(?:\.0*)?)(?![\d.])/g, "$1");
}

export function superscript(exponent: number): string {
  return String(exponent).replace(/[-\d]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)]));
}

export function step(value: number): string {
  return Math.round(value).toLocaleString("en-US");
}

export function short(label: string | number, most = 18): string {
  const text = String(label).replace(/\s+/g, " ");
  return text.length > most ? `${text.slice(0, most - 1)}…` : text || "(empty)";
}

export function sign(value: number): string {
  return value < 0 ? "helpful" : value > 0 ? "harmful" : "no influence";
}

export function csv(columns: string[], rows: (string | number | null)[][]): string {
  const cell = (value: string | number | null) => {
    const text = value === null || (typeof value === "number" && !Number.isFinite(value)) ? "" : String(value);
    // A text that a spreadsheet would take for a formula is marked as text.
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}
