import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { defineConfig, type Plugin } from "vite";

const BUNDLE = "../src/stagewise/explorer/bundle";

// One script and one style sheet, which Python puts into a page. The store is not compressed: no codec is needed.
const nothing = "data:text/javascript,export default undefined";

// Hashes of what the bundle was built from and of what was built, which a test compares without Node; and licences.
const beside: Plugin = {
  name: "beside-the-bundle",
  closeBundle() {
    const own = readdirSync("src", { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => `${entry.parentPath}/${entry.name}`);
    const sources = digest(".", ["package-lock.json", "vite.config.ts", ...own]);
    writeFileSync(`${BUNDLE}/sha256.txt`, `sources ${sources}\nbundle ${digest(BUNDLE, ["explorer.js", "explorer.css"])}\n`);
    writeFileSync(`${BUNDLE}/LICENSES.txt`, licences());
  },
};

function digest(folder: string, files: string[]): string {
  const hash = createHash("sha256");
  for (const file of files.sort()) hash.update(`${file}\0`).update(readFileSync(`${folder}/${file}`)).update("\0");
  return hash.digest("hex");
}

function licences(): string {
  const { packages } = JSON.parse(readFileSync("package-lock.json", "utf8")) as {
    packages: Record<string, { version: string; license?: string; dev?: boolean; optional?: boolean }>;
  };
  return Object.entries(packages)
    .filter(([folder, { dev, optional }]) => folder && !dev && !optional)
    .map(([folder, { version, license }]) => {
      const file = readdirSync(folder).find((name) => /^licen[cs]e/i.test(name));
      const text = file ? readFileSync(`${folder}/${file}`, "utf8").trim() : `Licence: ${license}`;
      return `${folder.replace(/^.*node_modules\//, "")} ${version}\n\n${text}\n`;
    })
    .join(`\n${"-".repeat(80)}\n\n`);
}

export default defineConfig({
  plugins: [beside],
  resolve: { alias: [{ find: /^numcodecs\/.*/, replacement: nothing }] },
  build: {
    outDir: BUNDLE,
    emptyOutDir: true,
    cssCodeSplit: false,
    modulePreload: false,
    rolldownOptions: {
      input: "src/main.ts",
      output: { entryFileNames: "explorer.js", assetFileNames: "explorer.[ext]", codeSplitting: false },
    },
  },
});
