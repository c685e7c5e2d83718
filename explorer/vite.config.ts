import { defineConfig } from "vite";

// One script and one style sheet, which Python puts into a page. The store is not compressed: no codec is needed.
const nothing = "data:text/javascript,export default undefined";
export default defineConfig({
  resolve: { alias: [{ find: /^numcodecs\/.*/, replacement: nothing }] },
  build: {
    outDir: "../src/stagewise/explorer/bundle",
    emptyOutDir: true,
    cssCodeSplit: false,
    modulePreload: false,
    rolldownOptions: {
      input: "src/main.ts",
      output: { entryFileNames: "explorer.js", assetFileNames: "explorer.[ext]", codeSplitting: false },
    },
  },
});
