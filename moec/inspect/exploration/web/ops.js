// The data of the page, and its graphs.
export const $=id=>document.getElementById(id);
const NONE={artifact:false,report:{passes:[],blocks:[]},declined:[],calls:[],weights:[],profile:null,routing:null,plan:null};
export const D={...NONE,...JSON.parse($('data').textContent)},T=D.texts,R=D.report;
export const of=D.comparison?'of':'after'; // steps are A and B, or passes

// Ops: rows [name, attributes, module, line, body, inputs, outputs as name, type, name, type …].
export const NAME=0,ATTRS=1,MODULE=2,LINE=3,BODY=4,INPUTS=5,OUTPUTS=6;
export const op=id=>D.ops[id],word=(id,field)=>T[D.ops[id][field]];
export const inputs=id=>D.ops[id][INPUTS];
export const quoted=name=>/^[A-Za-z_][\w.]*$/.test(name)?name:JSON.stringify(name);
export function outputs(id){
  const o=op(id)[OUTPUTS],list=[];
  for(let i=0;i<o.length;i+=2)list.push([o[i],T[o[i]],T[o[i+1]]]);
  return list;
}
export const before=id=>outputs(id).map(([,name,type])=>`${quoted(name)}: ${type}`).join(', ')+' = ';
export function after(id){
  const attrs=word(id,ATTRS);
  return `(${op(id)[INPUTS].map(i=>quoted(T[i])).join(', ')})${attrs?` <${attrs}>`:''}`;
}
// The stored array that holds a weight, perhaps with others.
export const namesOf=array=>array.name.replace(/\.packed$/,'').split('+');
export const arrayOf=name=>D.weights.find(w=>namesOf(w).includes(name));
export const irText=id=>before(id)+word(id,NAME)+after(id);
export const layers=new Map();
export function layerOf(id){
  const m=op(id)[MODULE];
  if(!layers.has(m)){
    const path=T[m].split(' ')[0],match=path.match(/^.*?(?:^|\.)\d+(?=\.|$)/);
    layers.set(m,path?(match?match[0]:path.split('.').slice(0,2).join('.')):'(no module)');
  }
  return layers.get(m);
}

// Graphs: each step is the hunks by which it differs from the one before.
export const states=D.functions.map(()=>[]);
export function graphAt(f,step){
  const list=states[f];
  for(let s=list.length;s<=step;s++){
    const old=s?list[s-1]:[],now=[];
    let at=0;
    for(const[position,gone,ids]of D.functions[f].steps[s].hunks){
      for(;at<position;at++)now.push(old[at]);
      at+=gone;
      for(const id of ids)now.push(id);
    }
    for(;at<old.length;at++)now.push(old[at]);
    list.push(now);
  }
  return list[step];
}
export const gone=step=>step.hunks.reduce((n,h)=>n+h[1],0),added=step=>step.hunks.reduce((n,h)=>n+h[2].length,0);
// By layer: pairs of positions before and after the step, -1 for none.
export function pairs(f,step){
  const old=graphAt(f,step-1),now=graphAt(f,step),groups=new Map();
  const group=name=>{if(!groups.has(name))groups.set(name,{rows:[],gone:0,added:0});return groups.get(name)};
  let i=0,j=0;
  const same=until=>{for(;i<until;i++,j++)group(layerOf(old[i])).rows.push([i,j])};
  for(const[position,count,ids]of D.functions[f].steps[step].hunks){
    same(position);
    const parts=new Map();
    const part=id=>{const k=layerOf(id);if(!parts.has(k))parts.set(k,[[],[]]);return parts.get(k)};
    for(let n=0;n<count;n++,i++)part(old[i])[0].push(i);
    for(let n=0;n<ids.length;n++,j++)part(now[j])[1].push(j);
    for(const[name,[left,right]]of parts){
      const g=group(name);
      g.gone+=left.length;g.added+=right.length;
      for(let n=0;n<Math.max(left.length,right.length);n++)g.rows.push([left[n]??-1,right[n]??-1]);
    }
  }
  same(old.length);
  return groups;
}
export function byLayer(f,step){
  const groups=new Map();
  graphAt(f,step).forEach((id,at)=>{
    const name=layerOf(id);
    if(!groups.has(name))groups.set(name,[]);
    groups.get(name).push(at);
  });
  return groups;
}
